"""Dynamic data pruning in a fit: the sampler gets the losses of the training pass, the loss gets the weights."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from curation.batch import batch_size
from curation.callbacks.lightning.loggers import log_histogram, takes_histograms
from curation.callbacks.lightning.loop import fit_batches, logs_now, trained_batches
from curation.callbacks.lightning.rate_scale import RateScale
from curation.callbacks.lightning.seam import BatchSeam
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.online.loss_check import LossCheck
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.online.row_weights import RowWeights, WeighsRows
from curation.callbacks.online.training_losses import TrainingLosses, step_loss
from curation.callbacks.samplers.round_training import RoundTraining
from curation.checks import check_number, check_path
from curation.samplers.dynamic_pruning import Batch, DynamicDataPruningSampler
from curation.samplers.prompts import PromptSampler
from curation.scoring import find_logits_maker


class DynamicDataPruning(WeighsRows, RoundTraining[DynamicDataPruningSampler]):
    """Trains on the rounds of a :class:`~curation.samplers.dynamic_pruning.DynamicDataPruningSampler`.

    Losses come from the training pass: the cross-entropies of the logits that ``training_step`` makes, or for any
    other loss, what it leaves in ``self.sample_losses`` (``[B]``). They are gathered from all processes in one
    collective a step, and wait for no device. Where the rule weighs samples, the gradient is weighed row by row
    (:class:`~curation.callbacks.online.row_weights.RowWeights`); a module with ``sample_weights`` multiplies its
    losses itself. What ``training_step`` logs is the unweighted loss of the rows that it sees, which are harder than
    the average: an early stop or a plateau schedule should look at validation.

    Logs ``curation/round``, ``curation/visited_fraction`` (of the samples, in the round), ``curation/mean_age``
    (rounds since samples were visited), ``curation/work_saved`` (against rounds of everything) and
    ``curation/pruning_progress``; of a :class:`~curation.samplers.prompts.PromptSampler` also
    ``curation/solved_fraction`` and ``curation/failed_fraction`` (of the prompts, whose last group was all right, or
    all wrong), ``curation/explore_right`` and ``curation/explore_wrong``, and in W&B and TensorBoard the histogram
    ``curation/pass_rate`` of the prompts. Reports every batch to :class:`~curation.callbacks.SampleRecord` and
    :class:`~curation.callbacks.SelectionLedger`.

    Args:
        lr_scale: The learning rate of a step is multiplied by ``(N / n) ** lr_scale`` for a round of ``n`` samples. 0
            leaves it; 1 is KAKURENBO's rule (arXiv 2310.10102); -1 takes out the factor that weights which sum to
            ``N`` put into the steps of SGD, and that Adam does not see. Schedulers and monitors see the rate without
            it.
        memory: File to which rank 0 writes the memory of a ``PromptSampler`` after every step, so that a killed fit
            loses no outcome of a step that has ended; the argument ``start`` of the sampler reads it. None writes
            none. It takes 8 ms a step for 3,072 prompts, 29 ms for 100,000.

    Attributes:
        sampler: The sampler of the training data loader; None before the loader is prepared.
        batches: Batches of this process that were trained on.

    Raises:
        ValueError: If the training data loader has no such sampler, or another batch size than it; if a selection of
            rows stands beside it; if batches hold other samples than were drawn.
        TypeError: If the losses of the rows are not known, or the weights do not reach the loss.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from curation.samplers import DynamicDataPruningSampler
        >>> dataset = list(range(64))
        >>> loader = DataLoader(dataset, 8, sampler=DynamicDataPruningSampler(dataset, 8))
        >>> callbacks = [DynamicDataPruning()]  # Trainer(callbacks=callbacks).fit(module, loader)
    """

    sampler_type = DynamicDataPruningSampler

    def __init__(self, lr_scale: float = 0.0, memory: str | Path | None = None) -> None:
        self.lr_scale = check_number("lr_scale", lr_scale, "[-1, 1]")
        self.memory = check_path("memory", memory, optional=True)
        super().__init__()
        self._reset()

    def _reset(self) -> None:
        self.batches = 0
        self._losses: TrainingLosses | None = None
        self._check = LossCheck()
        self._batch: Batch | None = None  # what this step trains on, of all processes
        self._order: Tensor | None = None  # places in the part of this process of the rows of its batch
        self._ids: Tensor | None = None
        self._trainer: Trainer | None = None
        self._rates: RateScale | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; refuse what cannot work."""
        if stage == "fit":
            self._reset()
            self._trainer = trainer
            rule = next((c for c in trainer.callbacks if isinstance(c, OnlineSelection)), None)  # type: ignore[attr-defined]
            if rule is not None:
                raise ValueError(
                    f"DynamicDataPruning needs the losses of all rows that were drawn, but {type(rule).__name__} "
                    "leaves some out."
                )
        super().setup(trainer, pl_module, stage)

    def watch(self, dataloader: Any) -> None:
        """Find the sampler, and tell it how long the fit is."""
        begins = self.sampler is None and self._state is None
        super().watch(dataloader)
        assert self.sampler is not None
        assert self._trainer is not None
        if self.memory is not None and not isinstance(self.sampler, PromptSampler):
            raise ValueError(
                f"Argument `memory` needs a PromptSampler, but got {self.memory!r} and a "
                f"{type(self.sampler).__name__}."
            )
        if begins:
            self.sampler.batches = trained_batches(self._trainer)  # by an earlier fit, which the length counts, too
        self.sampler.length = fit_batches(self._trainer, self.sampler.steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let optimizers use the learning rate of the round."""
        super().on_train_start(trainer, pl_module)
        if self.lr_scale:
            self._rates = RateScale(
                trainer, lambda _: 1.0 if self._batch is None else self._batch.share**-self.lr_scale
            )

    # ------------------------------------------------------------------ a step

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The batch as it is; its weights are set, and its losses will be taken."""
        if self not in trainer.callbacks:  # type: ignore[attr-defined]  # a tuner's step, which must leave no trace
            return batch
        assert self.sampler is not None
        rows = batch_size(batch)
        if rows != self.sampler.batch_size:
            raise ValueError(
                f"DynamicDataPruning drew {self.sampler.batch_size} samples for a batch that has {rows} rows; a "
                "`collate_fn` or a transfer hook must not leave rows out."
            )
        if self._losses is None:
            self._losses = TrainingLosses(pl_module, batch)
            self.row_weights = RowWeights(pl_module, find_logits_maker(pl_module, batch))
            rank_zero_info(f"DynamicDataPruning: losses by {self._losses.name}; rule {self.sampler.rule_name}.")
        assert self.row_weights is not None
        self._batch = self.sampler.next
        self._ids, weights = self._own_part(trainer, self._batch, sample_ids)
        if weights is not None:
            weights = weights.to(pl_module.device, non_blocking=True)
            weights = weights if self._order is None else weights[self._order]
        self.row_weights.set(weights)
        self._losses.watch(batch, rows)
        if not self._check.done and weights is None:
            self._check.watch(self._losses.route, self._losses.criterion, batch, rows)
        return batch

    def _own_part(self, trainer: Trainer, batch: Batch, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids and weights of the rows of this process, in the order in which they were drawn.

        Where the samples have ids, rows may come in another order, which is kept.

        Raises:
            ValueError: If the ids are others (on a GPU only the first batch is compared).
        """
        part = slice(trainer.global_rank, None, trainer.world_size)
        drawn, weights = batch.ids[part], None if batch.weights is None else batch.weights[part]
        self._order = None
        if ids is not None:
            expected, given = drawn.to(ids.device, non_blocking=True).sort(), ids.sort()
            if (ids.device.type == "cpu" or self.batches == 0) and not torch.equal(expected.values, given.values):
                has, drew = given.values.tolist()[:5], expected.values.tolist()[:5]
                raise ValueError(
                    f"A batch holds the samples {has}..., but {drew}... were drawn. Wrap the data set that the "
                    "sampler draws from in `SampleIds`, after any subset is taken."
                )
            self._order = torch.empty_like(ids).scatter_(0, given.indices, expected.indices)
        return drawn, weights

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that the batch to train on is the one that was drawn."""
        BatchSeam.check(trainer, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the losses of all processes to the sampler, and the batch to the listeners."""
        if self._batch is None:  # one that is not trained on, as at the end of stochastic weight averaging
            return
        assert self.sampler is not None
        assert self._losses is not None
        assert self.row_weights is not None
        size = self.sampler.batch_size
        losses, loss = self._losses.take_of_step(size, outputs), step_loss(outputs)
        if losses is None:
            losses = torch.full((size,), torch.nan, device=pl_module.device)
        elif not pl_module.automatic_optimization:  # it may call no hook
            self.row_weights.check()
        if not self._check.done and self.row_weights.weights is None:
            whole = loss * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None
            self._check.compare(pl_module, whole, f"`{self._losses.name}`", "leave the losses in `sample_losses`")
        self._report(trainer, pl_module, losses)
        drawn = losses if self._order is None else torch.empty_like(losses).scatter_(0, self._order, losses)
        everyone = trainer.strategy.all_gather(torch.cat([drawn, drawn.new_full((1,), elapsed(trainer))]))
        everyone = everyone.view(trainer.world_size, size + 1)
        self.sampler.elapsed = everyone[0, size]  # rank 0 decides what its clock says
        self.sampler.trained(everyone[:, :size].T.flatten())
        self.row_weights.set(None)
        self._batch = None
        self.batches += 1
        if isinstance(self.sampler, PromptSampler):
            self._show(trainer, self.sampler)
        if logs_now(trainer):
            for name, value in self.sampler.statistics.items():
                pl_module.log(f"curation/{name}", value, on_step=True, on_epoch=False, batch_size=1)
        if trainer.is_last_batch:
            self.sampler.end_epoch()

    def _show(self, trainer: Trainer, sampler: PromptSampler) -> None:
        """Write the memory of the prompts, and log their pass rates."""
        if self.memory is not None and trainer.is_global_zero:
            sampler.memory.save(self.memory, sampler.fingerprint)
        if logs_now(trainer) and takes_histograms(trainer):
            rates = sampler.memory.rate
            log_histogram(trainer, "curation/pass_rate", rates[rates.isfinite()].tolist())

    def _report(self, trainer: Trainer, pl_module: LightningModule, losses: Tensor) -> None:
        listeners = [c for c in trainer.callbacks if isinstance(c, SelectionListener)]  # type: ignore[attr-defined]
        if not listeners:
            return
        assert self.row_weights is not None
        assert self._ids is not None
        ids = self._ids.to(losses.device, non_blocking=True)
        ids = ids if self._order is None else ids[self._order]
        rows = torch.arange(len(losses), device=losses.device)
        choice = Choice(len(losses), len(losses), rows, self.row_weights.weights, scores=losses, sample_ids=ids)
        for listener in listeners:
            listener.on_selection(trainer, pl_module, self.batches, choice)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the module, and the learning rates."""
        super().teardown(trainer, pl_module, stage)
        if self._rates is not None:
            self._rates.remove()
        self._check.stop()
        if self._losses is not None:
            self._losses.stop()
        self._losses = self._trainer = self._rates = None

    def state_dict(self) -> dict[str, Any]:
        """The state of the sampler, and the number of batches; equal on all ranks."""
        return {**super().state_dict(), "batches": self.batches}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().restore(state)
        self.batches = state["batches"]


def elapsed(trainer: Trainer) -> float:
    """Share of ``max_time`` that is over, or of ``max_steps`` in a manual optimisation; 0 without both."""
    timer = next((c for c in trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
    left = None if timer is None else timer.time_remaining()
    if timer is not None and left is not None:
        spent = timer.time_elapsed()
        return spent / max(spent + left, 1e-9)
    manual = not trainer.lightning_module.automatic_optimization
    return min(1.0, trainer.global_step / trainer.max_steps) if manual and trainer.max_steps > 0 else 0.0
