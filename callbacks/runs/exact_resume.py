"""Exact resume: a run that was killed goes on as if it had not been."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from curation.callbacks.lightning.loop import Place, forget_training_loader, has_length, prepared_place
from curation.callbacks.lightning.restart import (
    begin_next_epoch,
    mend_counters,
    processed_batches,
    processed_in_epoch,
    resume_at,
    saved_at_last_batch,
    uncounted_batches,
)
from curation.callbacks.lightning.seam import BatchSeam, SeamClient, check_training_step
from curation.callbacks.runs.global_order import DIVIDED, GlobalOrder, describe_order, stateful
from curation.callbacks.runs.random_streams import RandomStreams
from curation.callbacks.runs.resumed_order import Position, ResumedOrder, ResumedStream
from curation.callbacks.runs.wandb_run import enter_wandb_run
from curation.callbacks.samplers.round_training import RoundTraining
from curation.samplers.rounds import RoundSampler


class ExactResume(SeamClient):
    """Resumes in the middle of an epoch with the same batches and the same random numbers.

    Lightning saves no random state, and a plain ``DataLoader`` starts its epoch again after a resume. Here the random
    streams of a process depend on its seed and on the number of batches trained on, and on nothing else: they are set
    anew for every batch, and the order of an epoch is drawn from a stream of its own. So a checkpoint holds counters
    and seeds, wherever it is taken. The resumed run draws the order of the epoch again and skips the batches trained
    on without loading them; what loader workers have fetched in advance does not count. A fit that ``max_steps``,
    ``max_time`` or a budget ended inside an epoch is extended from there, where Lightning alone would begin the next
    epoch.

    The seed is the one that torch has when the fit begins (``seed_everything``). The random numbers of a run with
    this callback differ from those of a run without it.

    Another number of processes can go on, too. It trains on the same sequence of samples, from the sample after the
    last that was trained on, each once an epoch; only the batches into which all processes divide it are others. This
    takes a loader that is shuffled without replacement, sequential, or has a sampler of this package other than
    ``TokenBudgetSampler``. The batch size may change with the number; with a sampler of rounds (``HardBatchSampler``,
    ``DynamicDataPruningSampler``) that of all processes must stay. The last batch of an epoch may be smaller, and is
    filled up with its own first samples until it can be divided. Of processes that the checkpoint does not have, the
    random streams are those of a new run. [Scale](../scale.md) says more.

    The training data may be in several data loaders, of which each goes on where it was (not on another number of
    processes). Of an iterable data set the batches trained on are read again and left out, which is exact if its
    samples depend on its epoch (``set_epoch``) and the global random streams alone. A stateful loader is left to
    Lightning; where that loses batches a warning says so. Not resumed: gradients that were being accumulated, the
    streams inside workers of a map-style loader, and samplers that draw from a global stream while they are iterated.
    Put the callback before ``ModelCheckpoint``; Lightning does so by itself. Sample ids are stripped, as in a
    selection.

    Attributes:
        position: The counters of the fit.
        batches: Batches trained on in the fit.

    Raises:
        TypeError: If ``training_step`` fetches its batches itself.
        ValueError: If a checkpoint was saved by another number of processes and its order cannot be divided anew, or
            inside an epoch of another length.
        RuntimeError: If Lightning goes on with another batch than the one after the last that was trained on.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> save = ModelCheckpoint("checkpoints", every_n_train_steps=100)
        >>> callbacks = [ExactResume(), save]  # Trainer(callbacks=callbacks).fit(module, loader, ckpt_path="last")
    """

    def __init__(self) -> None:
        self.position = Position()
        self._streams = RandomStreams([], 0)
        self._sampler_resumes = False
        self._order: dict[str, Any] = {}  # of the epochs, over all processes
        self._processes = 1  # by whose batches the position counts
        self._divided = False  # whether the order is divided anew, since another number of processes began with it
        self._recounted = False  # and Lightning's counters are still those of that number
        self._unrestored: Trainer | None = None
        self._seam: BatchSeam | None = None
        self._restored = False  # and no batch was trained on since
        self._counted: int | None = None  # Lightning's number of batches when the last one was counted here
        self._uncounted = 0
        self._saved_at_last_batch = False
        self._undo: list[Callable[[], None]] = []

    @property
    def batches(self) -> int:
        """Batches trained on in the fit."""
        return self.position.batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every rank's seed, and watch the training data loader as Lightning prepares it."""
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        check_training_step(pl_module)
        seed = torch.tensor(torch.initial_seed() % 2**63, device=trainer.strategy.root_device)
        seeds = trainer.strategy.all_gather(seed).flatten().tolist()
        self._streams = RandomStreams(seeds, trainer.global_rank)
        self.position = Position()
        self._order, self._processes, self._divided, self._recounted = {}, len(seeds), False, False
        self._unrestored, self._restored, self._counted = trainer, False, None
        self._seam = BatchSeam.of(trainer)
        self._uncounted, self._saved_at_last_batch = 0, False
        self._sampler_resumes = any(isinstance(c, RoundTraining) for c in trainer.callbacks)  # type: ignore[attr-defined]

    def watch(self, loader: Any) -> Any:
        """Let the order of the training data loader depend on the epoch, and begin after the batches trained on."""
        if self._unrestored is not None:  # a new run, or one resumed from a checkpoint without this callback
            self.position.epoch, self._unrestored = self._unrestored.current_epoch, None
        self._take_joined()
        if self._processes != len(self._streams.seeds):
            self._divide_anew(loader)
        elif not self._divided:
            self._keep_seed(loader)
            self._order = self._described(loader)
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset) and not stateful(loader):
            return self._read_on(loader)
        if not self._skips(loader):
            return None
        assert self._seam is not None
        self._replace_sampler(loader, prepared_place(self._seam.trainer).cycles)
        if self._sampler_resumes and any(isinstance(s, RoundSampler) for s in self._streams.samplers[0]):
            self.position.skip = 0  # the sampler restores its own position
        self._begin_epoch()
        return None

    def _read_on(self, loader: DataLoader) -> ResumedStream:
        if self.position.skip:
            rank_zero_info(
                f"ExactResume: the first {self.position.skip} batches of {type(loader.dataset).__name__} are read "
                "again and left out; what follows is exact if the data set gives the same samples in every reading."
            )
        self._streams.follow(loader, [])
        self.position.batches_per_epoch = None
        return ResumedStream(loader, self._streams, self.position)

    def watch_other(self, loader: Any, place: Place) -> None:
        """Let the order of a data loader that is not curated begin after the batches trained on, too."""
        if not self._skips(loader):
            return
        name, number = "sampler" if loader.batch_sampler is None else "batch_sampler", place.number + 1
        sampler = vars(loader)[name]
        if not isinstance(sampler, ResumedOrder):
            self._streams.follow(loader, [sampler, getattr(sampler, "sampler", None)], number)
            vars(loader)[name] = ResumedOrder(sampler, self._streams, self.position, number, place.cycles)
            self._undo.append(lambda: vars(loader).update({name: sampler}))

    def _skips(self, loader: Any) -> bool:
        """Whether batches of a data loader can be skipped; a warning says so where they cannot."""
        if stateful(loader):
            self._warn_of_lost_batches(loader)
            return False
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            data = loader.dataset if isinstance(loader, DataLoader) else loader
            rank_zero_warn(f"ExactResume cannot skip batches of {type(data).__name__}: a resumed epoch starts again.")
            return False
        return True

    def _described(self, loader: Any) -> dict[str, Any]:
        assert self._seam is not None
        count = prepared_place(self._seam.trainer).count
        return {"kind": f"{count} data loaders"} if count > 1 else describe_order(loader, len(self._streams.seeds))

    def _keep_seed(self, loader: Any) -> None:
        """Draw the order by the seed of the checkpoint: for several processes Lightning takes the environment's."""
        sampler, seed = getattr(getattr(loader, "batch_sampler", None), "sampler", None), self._order.get("seed")
        if type(sampler) is DistributedSampler and seed not in (None, sampler.seed):
            self._undo.append(partial(setattr, sampler, "seed", sampler.seed))
            sampler.seed = seed

    def _take_joined(self) -> None:
        """Count the batches of the data loader that a selection takes as one.

        Raises:
            ValueError: If they are others than in the checkpoint, in the middle of an epoch.
        """
        assert self._seam is not None
        joined, position = self._seam.joined(), self.position
        if self._restored and position.inside and joined != position.joined:
            raise ValueError(
                f"The checkpoint was saved inside an epoch with `candidate_batches={position.joined}`, but now it is "
                f"{joined}. Remove ExactResume to resume anyway."
            )
        if position.skip:
            position.skip = (position.batches_in_epoch - position.first_batch) * joined
        position.joined = joined

    def _divide_anew(self, loader: Any) -> None:
        """Count the position in batches of this number of processes.

        Raises:
            ValueError: If that cannot be done.
        """
        order, position, processes = self._order, self.position, len(self._streams.seeds)
        assert self._seam is not None
        own = self._described(loader)["kind"]
        for kind in (order.get("kind", "a checkpoint of an earlier version"), own):
            if kind not in DIVIDED or DIVIDED[kind] != DIVIDED[order["kind"]]:
                raise ValueError(
                    f"The checkpoint was saved by {self._processes} processes and cannot be resumed exactly by "
                    f"{processes}: the order of {kind} cannot be divided anew. Remove ExactResume to resume anyway."
                )
        if self._seam.trainer.limit_train_batches != 1.0:
            raise ValueError(
                f"The checkpoint was saved by {self._processes} processes and cannot be resumed exactly by "
                f"{processes} with `limit_train_batches`, which counts batches of another size. Remove ExactResume "
                "to resume anyway."
            )
        self._processes = processes
        if order["kind"] == "rounds":  # the sampler checks that the batch of all processes is the same
            return
        trained = position.samples(order["batch"]) if position.inside else 0
        divided = GlobalOrder(order, loader, self._streams, position)
        if trained and divided.order["samples"] != order["samples"]:
            raise ValueError(
                f"The checkpoint was saved after {trained} of {order['samples']} samples of an epoch, but the data "
                f"loader now has {divided.order['samples']}. Remove ExactResume to resume anyway."
            )
        whole, left = (-(-divided.left(samples) // position.joined) for samples in (0, trained))
        position.first, position.skip = trained, 0
        position.first_batch = position.batches_in_epoch = whole - left
        position.batches_per_epoch = len(divided)
        self._divided = self._recounted = True

    def _warn_of_lost_batches(self, loader: Any) -> None:
        name = type(loader).__name__
        if not has_length(loader):
            rank_zero_warn(
                f"ExactResume leaves the {name} to Lightning, which fetches a batch ahead of a loader without a "
                "length: each resume loses a batch."
            )
        elif self._restored and self.position.batches_in_epoch == 0 < self.position.batches:
            rank_zero_warn(
                f"ExactResume leaves the {name} to Lightning, and the checkpoint was saved after the last batch of "
                "an epoch: the loader may go on at the end of that epoch, so that the next one has no batches. "
                "Resume from a checkpoint inside an epoch instead."
            )

    def _replace_sampler(self, loader: DataLoader, cycles: bool) -> None:
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = original = vars(loader)[name]
        if isinstance(sampler, ResumedOrder):
            sampler = sampler.inner
        else:
            self._streams.follow(loader, [sampler, getattr(sampler, "sampler", None)])
            if self._divided:
                sampler = GlobalOrder(self._order, loader, self._streams, self.position)
            # DataLoader forbids assigning a sampler, but only what it yields is wrapped here.
            vars(loader)[name] = ResumedOrder(sampler, self._streams, self.position, cycles=cycles)
            self._undo.append(lambda: vars(loader).update({name: original}))
        if isinstance(sampler, GlobalOrder):
            self._order = sampler.order
        position, length = self.position, len(sampler) if hasattr(sampler, "__len__") else None
        if position.skip and length != position.batches_per_epoch:
            raise ValueError(
                f"The checkpoint was saved after {position.skip} of {position.batches_per_epoch} batches of an "
                f"epoch, but the data loader now has {length}: other data or another batch size. Remove ExactResume "
                "to resume anyway."
            )
        position.batches_per_epoch = length

    def _begin_epoch(self) -> None:
        """A loader with workers draws their seed as its iteration begins."""
        self._streams.begin_order(self.position.epoch)
        self._streams.begin_load(self.position.loaded)

    def before_transfer(self) -> None:
        """Set the stream of the training step."""
        self._streams.begin_step(self.position.batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Lightning go on where this fit does."""
        if self._restored:
            begin_next_epoch(trainer)
        if self._recounted:
            self._recount(trainer)
        elif self._restored and trainer.num_training_batches == float("inf") and not self.position.inside:
            resume_at(trainer, 0)  # after the last batch of an epoch whose length Lightning does not know
        self._counted = processed_batches(trainer)

    def _recount(self, trainer: Trainer) -> None:
        """Let Lightning count the batches of this number of processes."""
        self._recounted, ended = False, not self.position.inside and processed_in_epoch(trainer)
        batches, micro = self.position.batches_in_epoch, trainer.accumulate_grad_batches
        resume_at(trainer, int(trainer.num_training_batches) if ended else batches)
        if batches % micro:
            rank_zero_warn(
                f"The first optimizer step after the change of the number of processes has {micro - batches % micro} "
                f"batches, and not {micro}: accumulation counts the batches of an epoch."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the streams of the epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self.position.end_epoch()  # one that ended before its last batch
        self._begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that Lightning goes on with the batch after the last one that was trained on."""
        if self._restored and batch_idx != self.position.batches_in_epoch:
            raise RuntimeError(
                f"ExactResume goes on after {self.position.batches_in_epoch} batches of the epoch, but Lightning "
                f"after {batch_idx}. Remove ExactResume to resume anyway."
            )
        self._restored = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and set the stream for loading the next batch."""
        self.position.count_batch()
        self._counted = processed_batches(trainer)
        if trainer.is_last_batch:
            self.position.end_epoch()
        self._streams.begin_load(self.position.loaded)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the stream again: a resumed run does not repeat the validation before which it was saved."""
        if self.fitting and not trainer.sanity_checking:
            self._streams.begin_load(self.position.loaded)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count an epoch that ended without its last batch, because a hook asked for it."""
        if trainer.is_last_batch:
            self.position.end_epoch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy and the data loader as they were."""
        super().teardown(trainer, pl_module, stage)
        self._unwrap()
        self._streams.forget()
        self._unrestored = self._seam = None

    def _unwrap(self) -> None:
        while self._undo:
            self._undo.pop()()

    def state_dict(self) -> dict[str, Any]:
        """Counters and seeds; equal on all ranks."""
        return {
            "seeds": self._streams.seeds,
            "batches": self.position.batches,
            "epoch": self.position.epoch,
            "batches_in_epoch": self.position.batches_in_epoch,
            "batches_per_epoch": self.position.batches_per_epoch,
            "joined": self.position.joined,
            "first": self.position.first,
            "first_batch": self.position.first_batch,
            "order": self._order,
            "processes": self._processes,
            "divided": self._divided,
            "counted": self._counted,
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say which W&B run the checkpoint belongs to."""
        enter_wandb_run(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let Lightning go on at the place that the counters here tell."""
        state = checkpoint["callbacks"].get(self.state_key)
        if not self.fitting:
            return
        if state is None:
            rank_zero_warn(
                "The checkpoint was saved without ExactResume: if it is from inside an epoch, the epoch may begin "
                "again, with samples that were trained on."
            )
            return
        counted = state.get("counted")  # checkpoints of earlier versions have none
        self._uncounted = 0 if counted is None else uncounted_batches(checkpoint, counted)
        self._saved_at_last_batch = saved_at_last_batch(checkpoint)
        mend_counters(trainer, checkpoint)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the saved counters with the saved seeds; for other processes they are converted later."""
        self._unrestored, self._restored = None, True
        saved, own = state["seeds"], self._streams.seeds
        self._streams.seeds = saved[: len(own)] + own[len(saved) :]
        # Checkpoints of earlier versions have none of these.
        self._processes, self._divided = state.get("processes", len(saved)), state.get("divided", False)
        self._order = state.get("order", {})
        self.position.first, self.position.first_batch = state.get("first", 0), state.get("first_batch", 0)
        if self._processes != len(own) or self._divided:  # a tuner may have asked for the loader
            assert self._seam is not None
            self._unwrap()
            forget_training_loader(self._seam.trainer)
        # In place: a data loader that was prepared before may hold the object.
        for name in ("batches", "epoch", "batches_in_epoch", "batches_per_epoch"):
            setattr(self.position, name, state[name])
        self.position.joined = state.get("joined", 1)  # checkpoints of earlier versions have none
        for _ in range(self._uncounted):  # an error came between the training step and the hook that counts
            self.position.count_batch()
            if self._saved_at_last_batch:
                self.position.end_epoch()
        self.position.skip = self.position.batches_in_epoch - self.position.first_batch
