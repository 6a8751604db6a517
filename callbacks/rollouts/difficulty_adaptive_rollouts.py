"""More rollouts for prompts that are hard, in any module that makes rollouts (DARS, arXiv 2508.13755)."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from curation import rng
from curation.batch import batch_size, split_sample_ids
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.seam import refuse_strategies
from curation.callbacks.online.online_selection import logs_now
from curation.metrics.rollouts import SolveRate
from curation.replace import replace_attribute
from curation.rollouts.allocation import (
    DifficultyMemory,
    EqualTreatment,
    HardnessWeighted,
    Schedule,
    Uniform,
    plan,
)
from curation.rollouts.preflight import accuracies, forecast


class RolloutsOfAModule(Protocol):
    """What a module's ``rollout(batch, counts)`` gives."""

    rewards: Tensor  # [R], in [0, 1]
    prompts: Tensor  # int64 [R]: which prompt of the batch each is of

    def pool(self, other: Any) -> Any:
        """These and others of the same batch."""
        ...


class DifficultyAdaptiveRollouts(FitCallback):
    """Gives prompts ``n`` rollouts each, and then more to those that few of these solved.

    The module has a method ``rollout(batch, counts)``, with ``counts`` a NumPy array int64 ``[P]`` for the prompts of
    the batch, 0 for some, that makes so many rollouts of each with the weights as they are, and calls it in
    ``training_step`` once for a batch. It gives an object with ``rewards`` floating ``[R]`` in [0, 1], ``prompts``
    int64 ``[R]`` (rows of the batch, from 0) and ``pool(other)``, which makes one object of two. During the fit that
    call makes the rollouts of both stages, pooled, whatever its counts are. Evaluation is left alone.

    All processes make one plan, from the successes of all, and each adds rollouts to the prompts that it has, whose
    prompts it has already run through the model. Logs ``rollouts/solve_none``, ``solve_partial`` and ``solve_all`` by
    the first ``n``, the same ``_after`` of all of them, ``per_prompt`` and the seconds of both stages; in W&B a
    histogram of the rollouts per prompt.

    Args:
        schedule: Who gets how many more.
        n: First rollouts of every prompt.
        budget: Rollouts of a prompt on average, the first ones among them, that a step does not exceed and uses up
            while a prompt wants more; None for what the schedule says.
        forgetting: Remember what is known of each prompt from earlier epochs, where it counts for so much less each
            time, by ``batch["ids"]``, int64 ``[P]``; None plans by the present rollouts alone, as in the paper.
        preflight: Before training, the least number of prompts whose accuracy is estimated to forecast what schedules
            would do; 0 for none.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the module has no ``rollout``.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        n: int = 8,
        budget: float | None = None,
        forgetting: float | None = None,
        preflight: int = 64,
    ) -> None:
        if not (hasattr(n, "__index__") and n >= 1):
            raise ValueError(f"Argument `n` must be an integer >= 1, but got {n!r}.")
        if budget is not None and not budget >= n:
            raise ValueError(f"Argument `budget` must be at least n = {n} rollouts per prompt, but got {budget!r}.")
        if forgetting is not None and not 0 <= forgetting < 1:
            raise ValueError(f"Argument `forgetting` must be in [0, 1) or None, but got {forgetting!r}.")
        if schedule is not None and (isinstance(schedule, type) or not hasattr(schedule, "extra")):
            raise ValueError(
                f"Argument `schedule` must be a schedule, such as HardnessWeighted(), but got {schedule!r}."
            )
        if not (hasattr(preflight, "__index__") and preflight >= 0):
            raise ValueError(f"Argument `preflight` must be an integer >= 0, but got {preflight!r}.")
        self.schedule: Schedule = HardnessWeighted(std=True) if schedule is None else schedule
        if not self.schedule.extra(np.arange(n + 1.0), n).any():
            raise ValueError(
                f"Argument `n` must be such that the schedule adds rollouts, but {type(self.schedule).__name__} adds "
                f"none to n = {n}, whatever their rewards."
            )
        self.n = n
        self.budget = budget
        self.forgetting = forgetting
        self.preflight = preflight
        self._undo: Callable[[], None] | None = None
        self._reset()

    def _reset(self) -> None:
        self.memory = None if self.forgetting is None else DifficultyMemory(self.forgetting)
        self._logged: dict[str, float] = {}
        self._told = False
        self._per_prompt = np.zeros(0, np.int64)
        self._table: list[list[Any]] = []

    # ------------------------------------------------------------------ the rollouts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the module's rollouts."""
        self.fitting = stage == "fit"
        if not self.fitting:
            return
        refuse_strategies(trainer, self, FSDPStrategy)
        self._reset()
        if not callable(getattr(pl_module, "rollout", None)):
            raise TypeError(f"{type(pl_module).__name__} must have a method `rollout(batch, counts)`, but has none.")
        theirs: Any = pl_module.rollout

        @torch.compiler.disable  # plans and metrics are the host's
        def rollout(batch: Any, counts: Any) -> Any:
            return self._adaptive(trainer, theirs, batch, len(counts)) if trainer.training else theirs(batch, counts)

        self._undo = replace_attribute(pl_module, "rollout", rollout)

    def _adaptive(self, trainer: Trainer, make: Callable[[Any, np.ndarray], Any], batch: Any, size: int) -> Any:
        numbers = torch.arange(size)
        if self.memory is not None:
            if not isinstance(batch, Mapping) or "ids" not in batch:
                raise TypeError("Argument `forgetting` needs batches with `ids`, int64 [P], to know prompts again.")
            numbers = batch["ids"]
        began = time.perf_counter()
        first = checked(make(batch, np.full(size, self.n)), np.full(size, self.n))
        successes = _sums(first.rewards, first.prompts, size)
        planned = time.perf_counter()
        ids, of_all, mine = gather(trainer, numbers, successes)
        known = of_all
        if self.memory is not None:
            known = self.memory.successes(ids, of_all, self.n)
            self.memory.update(ids, of_all.tolist(), self.n)
        total = None if self.budget is None else int(self.budget * len(ids))
        extra = plan(self.schedule, known, self.n, total)
        ours = extra[mine]
        rollouts = first.pool(checked(make(batch, ours), ours)) if ours.any() else first
        after = _sums(rollouts.rewards, rollouts.prompts, size)
        ended = time.perf_counter()
        self._per_prompt = self.n + extra
        self._logged = {
            **_solved(successes, np.full(size, self.n), ""),
            **_solved(after, self.n + ours, "_after"),
            "per_prompt": float(self._per_prompt.mean()),
            "seconds_first": planned - began,
            "seconds_added": ended - planned,
        }
        return rollouts

    # ------------------------------------------------------------------ what is told

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forecast what schedules would do."""
        if not self.preflight or trainer.ckpt_path is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        seen: list[float] = []
        given = trainer.train_dataloader
        if not isinstance(given, DataLoader) or isinstance(given.dataset, IterableDataset):
            rank_zero_info("DifficultyAdaptiveRollouts makes no forecast: that needs one map-style data loader.")
            return
        # One of its own, since the fit may hold an iterator of the other.
        draw = torch.Generator().manual_seed(0)
        some = DataLoader(given.dataset, given.batch_size or 1, True, collate_fn=given.collate_fn, generator=draw)
        with rng.isolated(), ExitStack() as stack:
            stack.callback(setattr, trainer, "training", True)
            trainer.training = False  # of evaluation, so that nothing is remembered
            for batch in some:
                batch = trainer.precision_plugin.convert_input(split_sample_ids(batch)[0])
                batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                size = batch_size(batch)
                first = checked(pl_module.rollout(batch, np.full(size, self.n)), np.full(size, self.n))  # type: ignore[operator]
                seen += _sums(first.rewards, first.prompts, size).tolist()
                if len(seen) >= self.preflight:
                    break
        accuracy = accuracies(np.array(seen), self.n)
        total = None if self.budget is None else int(self.budget * len(seen))
        schedules: list[tuple[str, Schedule | None, int | None]] = [
            (f"{self.n} each", None, None),
            (f"{2 * self.n} each", Uniform(2 * self.n), None),
            *(
                (f"{name}{', std' * std}", cls(std=std), None)
                for name, cls in (("equal treatment", EqualTreatment), ("hardness weighted", HardnessWeighted))
                for std in (False, True)
            ),
            ("this fit", self.schedule, total),
        ]
        lines = [f"accuracy {accuracy.mean():.2f} over {len(seen)} prompts; expected per prompt and step:"]
        self._table = []
        for name, schedule, budget in schedules:
            f = forecast(schedule, accuracy, self.n, budget)
            lines.append(
                f"  {name:24} {f.rollouts:6.1f} rollouts, {f.all_wrong:6.1%} all wrong, {f.all_right:6.1%} all right"
            )
            self._table.append([name, f.rollouts, f.all_wrong, f.all_right])
        rank_zero_info("DifficultyAdaptiveRollouts: " + "\n".join(lines))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = ["schedule", "rollouts", "all wrong", "all right"]
                logger.log_table("rollouts/preflight", columns=columns, data=self._table)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was planned and what came of it."""
        if not self._logged and not self._told:
            self._told = True
            rank_zero_warn(
                f"DifficultyAdaptiveRollouts changes nothing: {type(pl_module).__name__}.training_step did not call "
                "`self.rollout(batch, counts)`."
            )
        for name, value in self._logged.items():
            pl_module.log(f"rollouts/{name}", value, on_step=True, on_epoch=False, batch_size=1, sync_dist=True)
        if self._logged and logs_now(trainer):
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    import wandb

                    histogram = wandb.Histogram(self._per_prompt.tolist())
                    step = trainer.fit_loop.epoch_loop._batches_that_stepped
                    logger.log_metrics({"rollouts/per_prompt_histogram": histogram}, step=step)  # type: ignore[dict-item]
        self._logged = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its rollouts back."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As :meth:`teardown`, which Lightning does not call then."""
        self.teardown(trainer, pl_module, "")

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of prompts, the same on every rank."""
        return {"memory": {} if self.memory is None else dict(self.memory.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it, in a fit."""
        if self.fitting and self.memory is not None:
            self.memory.counts = dict(state_dict["memory"])


def checked(rollouts: Any, counts: np.ndarray) -> Any:
    """The rollouts of a module, if they are what was asked for.

    Raises:
        ValueError: If there are not as many of each prompt, or a reward is not in [0, 1].
        TypeError: If they have no ``rewards``, ``prompts`` and ``pool``.
    """
    for name in ("rewards", "prompts", "pool"):
        if not hasattr(rollouts, name):
            raise TypeError(f"`rollout` must give an object with `{name}`, but gave {type(rollouts).__name__}.")
    for name in ("rewards", "prompts"):
        if not isinstance(getattr(rollouts, name), Tensor):
            raise TypeError(
                f"`rollout(...).{name}` must be a tensor, but is {type(getattr(rollouts, name)).__name__}."
            )
    rewards, prompts = rollouts.rewards.cpu(), rollouts.prompts.cpu()
    expected = np.arange(len(counts)).repeat(counts)
    if not (rewards.shape == prompts.shape == expected.shape and np.array_equal(prompts.sort().values, expected)):
        raise ValueError(
            f"`rollout` was asked for {counts.tolist()} rollouts of the prompts 0 to {len(counts) - 1}, but gave "
            f"{list(rewards.shape)} rewards of the prompts {list(prompts.shape)}, not as many of each."
        )
    wrong = rewards[~((rewards >= 0) & (rewards <= 1))]
    if len(wrong):
        raise ValueError(f"`rollout(...).rewards` must be in [0, 1], but has {float(wrong[0])}.")
    return rollouts


def gather(trainer: Trainer, ids: Tensor, successes: np.ndarray) -> tuple[list[int], np.ndarray, slice]:
    """The prompts of all processes in the order of ranks, their successes, and which of them are this one's.

    Args:
        trainer: Of the fit.
        ids: int64 ``[P]``; the number may differ between processes.
        successes: fp64 ``[P]``.
    """
    if trainer.world_size == 1:
        return ids.tolist(), successes, slice(0, len(successes))
    device, strategy = trainer.strategy.root_device, trainer.strategy
    sizes = strategy.all_gather(torch.tensor([len(ids)], device=device)).flatten().tolist()

    def of_all(values: Tensor) -> Tensor:
        padded = values.new_zeros(max(sizes))
        padded[: len(values)] = values
        rows = strategy.all_gather(padded.to(device)).cpu().view(len(sizes), -1)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    start = sum(sizes[: trainer.global_rank])
    numbers, sums = of_all(ids.cpu()).tolist(), of_all(torch.from_numpy(successes).float()).double().numpy()
    return numbers, sums, slice(start, start + len(ids))


def _sums(rewards: Tensor, prompts: Tensor, size: int) -> np.ndarray:
    return np.bincount(prompts.cpu().numpy(), rewards.double().cpu().numpy(), size)


def _solved(successes: np.ndarray, n: np.ndarray, suffix: str) -> dict[str, float]:
    """The shares of :class:`SolveRate`."""
    metric = SolveRate()
    metric.update(torch.from_numpy(successes), torch.from_numpy(n))
    return {f"{name}{suffix}": float(share) for name, share in metric.compute().items()}
