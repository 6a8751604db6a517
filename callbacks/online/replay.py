"""A selection that is made in one run, by a small model alone, and trained on in another."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.callbacks.lightning.loop import curated_loader, fit_batches, has_length, logs_now
from curation.callbacks.online.hard_samples import HardSampleSelection
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.runs.exact_resume import ExactResume
from curation.checks import check_path
from curation.records.ledger import Ledger
from curation.samplers.global_batch import GlobalBatchSampler


class SelectionRehearsal(HardSampleSelection):
    """Chooses rows as ``HardSampleSelection`` does, for another run; this one trains on every candidate.

    Fit the small model with it, a :class:`~curation.callbacks.SelectionLedger` and ``ExactResume``, and the large one
    with :class:`ReplaySelection` on that ledger. ``samples_trained`` counts the rows that were chosen.

    Args:
        keep: Fraction of each candidate batch that is chosen, in (0, 1).
        rule: One without weights, as in ``HardSampleSelection``.
        score: ``"loss"``, ``"grad_norm"`` or ``"reducible_loss"``.
        irreducible: File with the irreducible losses.
        pressure: Used by ``"rank"``.
        beta: Used by ``"selective_backprop"``.
        seed: Seed of the random draws, in [0, 2^63); equal on all ranks.
        drop: Used by ``"drop_high"``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from curation.callbacks import SelectionLedger
        >>> callbacks = [SelectionRehearsal(keep=0.5), SelectionLedger("choices"), ExactResume()]
        >>> # Trainer(callbacks=callbacks).fit(proxy, loader)
    """

    def __init__(
        self,
        keep: float,
        rule: Literal["top", "rank", "proportional", "selective_backprop", "drop_high"] = "top",
        score: Literal["loss", "grad_norm", "reducible_loss"] = "loss",
        irreducible: str | None = None,
        pressure: float = 100.0,
        beta: float | None = None,
        seed: int = 0,
        drop: float = 0.3,
    ) -> None:
        if rule == "importance":
            raise ValueError("Argument `rule` must be one without weights, but got 'importance'.")
        super().__init__(keep, rule, score, irreducible, pressure, beta, seed=seed, trim=False, drop=drop)

    def _reset(self) -> None:
        super()._reset()
        self.loss_check.done = True  # it compares with the loss of the rows that are chosen

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """Every candidate."""
        super().curate(trainer, pl_module, batch, sample_ids)
        return batch


class ReplaySelection(OnlineSelection):
    """Trains on the rows that another run chose, and scores nothing.

    The run that chose had the same data, batches and number of processes, so that every step has the same candidates:
    both need ``ExactResume`` with the same seed, or a sampler of this package. Sample ids are compared at every step.

    Args:
        choices: Folder of the ledger that the run has written with ``SelectionLedger``.
        trim: Drop the padding columns that no kept row uses.

    Raises:
        ValueError: If there is no ledger, its run had weights or another number of processes, or ended before this
            fit does; if the order of the batches is not fixed.
        RuntimeError: If a step has other candidates than in the ledger.

    Example:
        >>> callbacks = [ReplaySelection("choices"), ExactResume()]  # Trainer(callbacks=callbacks).fit(model, loader)
    """

    has_scores = False
    guarded = False  # the module is not called

    def __init__(self, choices: str | Path, trim: bool = True) -> None:
        self.choices = check_path("choices", choices)
        super().__init__(keep=1.0, trim=trim)

    def _reset(self) -> None:
        super()._reset()
        self._steps: Any = None
        self._chosen: np.ndarray = np.zeros(0, np.int64)
        self._others: Tensor | None = None  # whether a step had other candidates

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the first choice; install the seam."""
        if stage == "fit":
            self.keep = self._read_keep(trainer)
        super().setup(trainer, pl_module, stage)

    def _read_keep(self, trainer: Trainer) -> float:
        try:
            ledger = Ledger(self.choices)
        except FileNotFoundError as error:
            raise ValueError(
                f"Argument `choices` must be the folder of a ledger, but got {self.choices!r}."
            ) from error
        ranks = len({file.parent for file in ledger.files})
        if ranks != trainer.world_size:
            raise ValueError(
                f"Argument `choices` must be the ledger of {trainer.world_size} processes, but that in "
                f"{self.choices!r} is of {ranks}."
            )
        firsts = [next(ledger.steps(rank))[1]["kept"] > 0 for rank in range(ranks)]
        keep = max(map(np.sum, firsts)) / max(map(len, firsts))  # as the budget of the run was fixed
        if keep == 1:
            raise ValueError(f"Argument `choices` must leave rows out, but {self.choices!r} keeps every one.")
        return float(keep)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an order that is not fixed, and a ledger that ends before the fit."""
        super().on_train_start(trainer, pl_module)
        loader: Any = curated_loader(trainer)
        resumes = any(isinstance(c, ExactResume) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if not (resumes or isinstance(getattr(loader, "sampler", None), GlobalBatchSampler)):
            raise ValueError(
                "Argument `choices` needs batches in a fixed order: add `ExactResume`, with which the ledger was "
                "written, too, or a sampler of this package."
            )
        steps = 1 + Ledger(self.choices).last_step(trainer.global_rank)
        wanted = fit_batches(trainer, len(loader)) if has_length(loader) else float("inf")
        if steps < wanted < float("inf"):
            raise ValueError(
                f"Argument `choices` must be the ledger of a run of at least {int(wanted)} batches, but that in "
                f"{self.choices!r} has {steps}."
            )

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """1 for the rows that were chosen, 0 for the others: fp32 ``[B]``."""
        if sample_ids is None:
            raise TypeError(
                "ReplaySelection needs sample ids: wrap the training data set in `curation.sample_ids.SampleIds`, "
                "and keep its key `sample_id` in a `collate_fn` of your own."
            )
        if self._probing:
            raise RuntimeError("ReplaySelection cannot be tuned: the batches of a trial are not those of its ledger.")
        if self._steps is None:
            self._steps = Ledger(self.choices).steps(trainer.global_rank, self.batches)
        step, then = next(self._steps, (-1, None))
        if then is None or step != self.batches:
            raise RuntimeError(f"The ledger in {self.choices!r} has no choice for the batch after {self.batches}.")
        if (then["weight"][then["kept"] > 0] != 1).any():
            raise ValueError(f"Argument `choices` must be a ledger without weights, but {self.choices!r} has some.")
        ids = torch.from_numpy(then["sample_id"].copy())  # Arrow's is read-only
        self._chosen = then["kept"] > 0
        if len(ids) != len(sample_ids):
            raise self._differs()
        others = ids.to(sample_ids.device, non_blocking=True).ne(sample_ids).any()
        self._others = others if self._others is None else self._others | others
        if others.device.type == "cpu" or self.batches == 0 or logs_now(trainer):  # elsewhere the host would wait
            self._check_candidates()
        return torch.from_numpy(self._chosen).float().to(sample_ids.device, non_blocking=True)

    def _check_candidates(self) -> None:
        if self._others is not None and bool(self._others):
            raise self._differs()

    def _differs(self) -> RuntimeError:
        return RuntimeError(
            f"The candidates after {self.batches} batches are not those of the ledger in {self.choices!r}: other "
            "data, another order, batch size or seed."
        )

    def choose(self, trainer: Trainer, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """The rows that were chosen: int64 ``[k]``, ascending."""
        rows = torch.from_numpy(np.flatnonzero(self._chosen))
        if len(rows) != min(k, len(scores)):
            raise ValueError(
                f"Argument `choices` must be a ledger of {min(k, len(scores))} rows for a batch of {len(scores)}, "
                f"but {self.choices!r} has {len(rows)} after {self.batches} batches."
            )
        return rows.to(scores.device, non_blocking=True), None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the candidates of the last steps."""
        self._check_candidates()
        super().on_fit_end(trainer, pl_module)

    def describe(self) -> str:
        """Where the choices come from."""
        return f"rows of {self.choices}, nothing is scored"
