"""How many of the tokens of a fit are padding, and how many a second it reads."""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.batch import is_masked_text
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loggers import log_image, not_essential, picture_folder, save_figure
from curation.callbacks.lightning.loop import is_accumulating, logs_now, skips_backward
from curation.scoring import IGNORED

LONGEST = 1 << 14  # tokens of a row that are told apart
BINS = LONGEST + 1


class TokenMeter(FitCallback):
    """Logs padding and tokens a second, of batches with ``input_ids`` and ``attention_mask``, both ``[B, T]``.

    On logging steps, for all processes and the steps since the last: ``curation/padding_fraction`` and
    ``curation/label_fraction`` (tokens that are padding, and tokens with a label, of those that are computed),
    ``curation/tokens_per_second``, ``curation/real_tokens_per_second`` (without padding), ``curation/rank_tokens``
    (computed by a process in a batch) and ``curation/rank_tokens_max`` (by the process with the most). Evaluation is
    off the clock. Where a selection makes the batch smaller, it counts what is trained on.

    At the end of the fit it draws the lengths of the rows and those that they were computed at: ``tokens.png`` in the
    folder of the logger, and in W&B. Costs 256 kB on the device, and no wait for it outside logging steps.

    Attributes:
        counts: int64 ``[2, 16385]``, rows of all processes of each length, and computed at each length, up to the
            last logging step; longer ones are in the last column.

    Raises:
        TypeError: If a batch has no such fields.

    Example:
        >>> meter = TokenMeter()
        >>> callbacks = [meter]  # Trainer(callbacks=callbacks).fit(module, loader)
        >>> int(meter.counts.sum())
        0
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.counts = torch.zeros(2, BINS, dtype=torch.int64)
        self._window: Tensor | None = None  # this process's since the last logging step: both counts, three sums
        self._steps = 0
        self._seconds = 0.0
        self._clock = 0.0
        self._folder: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._folder = picture_folder(trainer)
        self._window = torch.zeros(2 * BINS + 3, dtype=torch.int64, device=pl_module.device)
        self._clock = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the tokens, which the training step may take out of the batch."""
        if skips_backward(trainer):
            return
        if not is_masked_text(batch):
            raise TypeError("TokenMeter counts batches with `input_ids` and `attention_mask`, both [B, T].")
        assert self._window is not None
        mask, labels = batch["attention_mask"], batch.get("labels")
        lengths = mask.ne(0).sum(1)
        rows, width = mask.shape
        self._window.index_add_(0, lengths.clamp(max=LONGEST), torch.ones_like(lengths))
        self._window[BINS + min(width, LONGEST)] += rows
        self._window[-3] += rows * width
        self._window[-2] += lengths.sum()
        if isinstance(labels, Tensor) and labels.shape == mask.shape:
            self._window[-1] += labels.ne(IGNORED).sum()
        self._steps += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was counted since the last logging step."""
        if self._steps and logs_now(trainer) and not is_accumulating(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        everyone = self._enter(trainer)
        self._tick()  # after the wait for the device
        computed, real, labelled = everyone[:, -3:].sum(0).tolist()
        values = {
            "padding_fraction": 1 - real / max(computed, 1),
            "label_fraction": labelled / max(computed, 1),
            "tokens_per_second": computed / self._seconds,
            "real_tokens_per_second": real / self._seconds,
            "rank_tokens": computed / len(everyone) / self._steps,
            "rank_tokens_max": int(everyone[:, -3].max()) / self._steps,
        }
        for name, value in values.items():
            pl_module.log(f"curation/{name}", value, on_step=True, on_epoch=False, batch_size=1)
        self._steps, self._seconds = 0, 0.0

    def _enter(self, trainer: Trainer) -> Tensor:
        """The counts and sums of every process, on the host, which are entered into those of all."""
        assert self._window is not None
        everyone = trainer.strategy.all_gather(self._window).reshape(-1, len(self._window)).cpu()
        self._window = torch.zeros_like(self._window)
        self.counts += everyone[:, : 2 * BINS].sum(0).view(2, BINS)
        return everyone

    def _tick(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._clock = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if self.fitting and not trainer.sanity_checking:
            self._tick()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again."""
        self._clock = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the rest, and draw."""
        self._enter(trainer)
        if self._folder is None or not trainer.is_global_zero or not self.counts.any():
            return
        with not_essential("The picture 'tokens.png'"):
            figure = draw_lengths(self.counts)
            save_figure(figure, f"{self._folder}/tokens.png")
            log_image(trainer, "curation/tokens", figure)

    def state_dict(self) -> dict[str, Any]:
        """The counts, up to the last column in use; equal on all ranks."""
        used = self.counts.any(0).nonzero()
        return {"counts": self.counts[:, : int(used.max()) + 1 if len(used) else 0].clone()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.counts[:, : state["counts"].size(1)] = state["counts"]


def draw_lengths(counts: Tensor) -> Any:
    """Two histograms over one another: the tokens of rows by their length, and by that which they are computed at.

    Args:
        counts: int64 ``[2, L]``: rows of each length, rows computed at each.

    Returns:
        A ``matplotlib.figure.Figure``. What stands out above the lower histogram is padding.
    """
    from matplotlib.figure import Figure

    longest = int(counts.any(0).nonzero().max())
    edges = torch.linspace(0.5, longest + 0.5, min(longest, 48) + 1)
    lengths = torch.arange(counts.size(1))
    tokens = counts * lengths
    real, computed = (int(part.sum()) for part in tokens)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for part, colour, text in (
        (tokens[1], "#d55e00", f"computed: {computed:,}"),
        (tokens[0], "#0072b2", f"real: {real:,}"),
    ):
        axes.hist(lengths.numpy(), bins=edges.tolist(), weights=part.numpy(), color=colour, alpha=0.6, label=text)
    axes.set(xlabel="length of a row, in tokens", ylabel="tokens", xlim=(0, longest + 1))
    axes.set_title(f"{computed / max(real, 1):.3f} tokens computed for each real one", loc="left")
    axes.legend(title="tokens", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure
