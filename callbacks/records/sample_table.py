"""A table of candidates as they are: text, image, label."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loggers import log_table, not_essential, takes_media
from curation.callbacks.lightning.loop import curated_loader, logging_step, logs_now
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.records.entries import sample_ids_of
from curation.checks import check_integer


class SampleTable(FitCallback, SelectionListener):
    """Logs a W&B table of candidates with what they are, beside a selection: ``curation/shown``.

    The last candidates of logging steps, as many kept as left out where there are: step, sample id, score, whether it
    was kept, and what ``show`` gives. It is written when the fit ends, on an error too.

    Args:
        show: Name of a field of the samples, or a function of a sample that gives a value, or a mapping of columns.
            A tensor ``[C, H, W]`` with 1 or 3 channels becomes an image.
        rows: Rows of the table.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the samples have no ids, or no such field.

    Example:
        >>> table = SampleTable(show=lambda sample: {"text": sample["text"], "label": sample["label"]})
        >>> callbacks = ["a selection", table]
    """

    def __init__(self, show: str | Callable[[Any], Any], rows: int = 64) -> None:
        if not (isinstance(show, str) or callable(show)):
            raise ValueError(f"Argument `show` must be the name of a field or a function, but got {show!r}.")
        self.show = show
        self.rows = check_integer("rows", rows, 2)
        self._reset()

    def _reset(self) -> None:
        half = self.rows // 2
        self._table: dict[bool, deque[list[Any]]] = {kept: deque(maxlen=half) for kept in (True, False)}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin with an empty table."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._reset()

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Remember the candidates of a logging step; the first batch is checked."""
        ids = sample_ids_of(self, choice)
        if not any(self._table.values()) and step == 0:
            self._shown(trainer, int(ids[0]))
        if not (logs_now(trainer) and takes_media(trainer)) or choice.rows is None or choice.scores is None:
            return
        kept = set(choice.rows.tolist())
        for row, (sample_id, score) in enumerate(zip(ids.tolist(), choice.scores.tolist(), strict=True)):
            self._table[row in kept].append([logging_step(trainer), sample_id, score, row in kept])

    def _shown(self, trainer: Trainer, sample_id: int) -> dict[str, Any]:
        dataset: Any = curated_loader(trainer).dataset
        sample = getattr(dataset, "dataset", dataset)[sample_id]  # without its id
        if callable(self.show):
            value = self.show(sample)
            return dict(value) if isinstance(value, Mapping) else {"sample": value}
        if not isinstance(sample, Mapping) or self.show not in sample:
            fields = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else type(sample).__name__
            raise TypeError(f"Argument `show` must name a field of the samples, {fields}, but got {self.show!r}.")
        return {self.show: sample[self.show]}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the table."""
        rows = sorted((*self._table[True], *self._table[False]), key=lambda row: row[0])
        self._reset()
        if not rows:
            return
        with not_essential("The table 'curation/shown'"):
            shown = [self._shown(trainer, row[1]) for row in rows]
            columns = list(dict.fromkeys(name for values in shown for name in values))
            table = [
                [*row, *(_loggable(values.get(name)) for name in columns)]
                for row, values in zip(rows, shown, strict=True)
            ]
            log_table(trainer, "curation/shown", ["step", "sample_id", "score", "kept", *columns], table)


def _loggable(value: Any) -> Any:
    """A value for a cell of a table: numbers, texts, images as they are, other objects as text."""
    if isinstance(value, Tensor) and value.dim() == 3 and value.size(0) in (1, 3):
        import wandb

        low, high = value.min(), value.max()
        return wandb.Image(((value - low) / (high - low).clamp(min=1e-12)).movedim(0, -1).numpy())
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else str(value.tolist())
    if value is None or isinstance(value, (bool, int, float, str)) or type(value).__module__.startswith("wandb"):
        return value
    return str(value)
