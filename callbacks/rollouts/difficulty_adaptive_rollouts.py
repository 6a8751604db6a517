"""More rollouts for prompts that are hard, in any module that makes rollouts (DARS, arXiv 2508.13755)."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from curation import rng
from curation.batch import batch_size, split_sample_ids
from curation.callbacks.lightning.collectives import gather_rows, gather_sizes
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loggers import log_histogram, log_table
from curation.callbacks.lightning.loop import logs_now, move_to_device
from curation.callbacks.lightning.seam import refuse_strategies
from curation.callbacks.rollouts.checked_rollouts import check_rollouts, successes
from curation.checks import check_integer, check_number
from curation.metrics.rollouts import SolveRate
from curation.replace import replace_attribute
from curation.rollouts.allocation import DifficultyMemory, HardnessWeighted, Schedule, plan
from curation.rollouts.preflight import accuracies, compare_schedules


class DifficultyAdaptiveRollouts(FitCallback):
    """Answers every prompt ``n`` times, and those again that few of these rollouts solved.

    The module has a method ``rollout(batch, counts)`` that its ``training_step`` calls once. ``counts`` is a NumPy
    array int64 ``[P]``: the number of rollouts that each prompt of the batch gets, 0 for some. The method makes them
    with the current weights and returns an object with

    - ``rewards``, floating ``[R]`` in [0, 1];
    - ``prompt_index``, int64 ``[R]``: the row of the batch that each rollout answers. An object that has ``prompts``
      instead, the older name, is accepted, too;
    - ``pool(other)``, which merges two such objects of one batch.

    During a fit that call returns the pooled rollouts of both stages, whatever its ``counts`` are. Evaluation does
    not change. All processes compute one plan, from the successes on all of them, and each process adds rollouts to
    its own prompts.

    Logs ``rollouts/solve_none``, ``solve_partial`` and ``solve_all`` by the first ``n`` rollouts, the same with the
    suffix ``_after`` by all rollouts, ``per_prompt``, and the seconds of both stages; in W&B and TensorBoard a
    histogram of the rollouts per prompt.

    Args:
        schedule: How many rollouts to add to a prompt; None for ``HardnessWeighted(std=True)``.
        n: Number of first rollouts of every prompt.
        budget: Mean number of rollouts per prompt, the first ones included. A step never exceeds it, and uses it up
            as long as a prompt wants more; None for the numbers of the schedule.
        forgetting: Factor in [0, 1) by which earlier observations of a prompt count less with every epoch; prompts
            are recognised by ``batch["ids"]``, int64 ``[P]``. None plans by the current rollouts alone, as the paper.
        preflight: Least number of prompts whose accuracy is estimated before training, for a forecast of what each
            schedule would do; 0 for no forecast.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the module has no ``rollout``.

    Example:
        >>> from curation.rollouts import EqualTreatment
        >>> callback = DifficultyAdaptiveRollouts(EqualTreatment(), n=8, budget=16)
        >>> callback.n, callback.budget
        (8, 16.0)
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        n: int = 8,
        budget: float | None = None,
        forgetting: float | None = None,
        preflight: int = 64,
    ) -> None:
        self.n: int = check_integer("n", n, 1)
        self.budget: float | None = check_number("budget", budget, f"[{n}, inf)", optional=True)
        self.forgetting: float | None = check_number("forgetting", forgetting, "[0, 1)", optional=True)
        self.preflight: int = check_integer("preflight", preflight, 0)
        if schedule is not None and (isinstance(schedule, type) or not hasattr(schedule, "extra")):
            raise ValueError(
                f"Argument `schedule` must be a schedule, such as HardnessWeighted(), but got {schedule!r}."
            )
        self.schedule: Schedule = HardnessWeighted(std=True) if schedule is None else schedule
        if not self.schedule.extra(np.arange(n + 1.0), n).any():
            raise ValueError(
                f"Argument `n` must be such that the schedule adds rollouts, but {type(self.schedule).__name__} adds "
                f"none to n = {n}, whatever their rewards."
            )
        self._undo: Callable[[], None] | None = None
        self._reset()

    def _reset(self) -> None:
        self.memory = None if self.forgetting is None else DifficultyMemory(self.forgetting)
        self._metrics: dict[str, float] = {}  # of the current step, until they are logged
        self._warned = False
        self._per_prompt = np.zeros(0, np.int64)

    # ------------------------------------------------------------------ rollouts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the module's ``rollout``."""
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        refuse_strategies(trainer, self, FSDPStrategy)
        self._reset()
        if not callable(getattr(pl_module, "rollout", None)):
            raise TypeError(f"{type(pl_module).__name__} must have a method `rollout(batch, counts)`, but has none.")
        original: Any = pl_module.rollout

        @torch.compiler.disable  # plans and metrics are the host's
        def rollout(batch: Any, counts: Any) -> Any:
            if not trainer.training:
                return original(batch, counts)
            return self._two_stages(trainer, original, batch, len(counts))

        self._undo = replace_attribute(pl_module, "rollout", rollout)

    def _two_stages(self, trainer: Trainer, rollout: Callable[..., Any], batch: Any, prompts: int) -> Any:
        """The first rollouts of ``P = prompts`` prompts, pooled with those that the plan adds."""
        ids = torch.arange(prompts)
        if self.memory is not None:
            if not isinstance(batch, Mapping) or "ids" not in batch:
                raise TypeError("Argument `forgetting` needs batches with `ids`, int64 [P], to know prompts again.")
            ids = batch["ids"]
        start = time.perf_counter()
        first_counts = np.full(prompts, self.n)
        rollouts = check_rollouts(rollout(batch, first_counts), first_counts)
        first_successes = successes(rollouts, prompts)
        planned = time.perf_counter()
        extra, local = self._plan(trainer, ids, first_successes)
        added = extra[local]
        if added.any():
            rollouts = rollouts.pool(check_rollouts(rollout(batch, added), added))
        all_successes = successes(rollouts, prompts)
        end = time.perf_counter()
        self._per_prompt = self.n + extra
        self._metrics = {
            **_solve_rates(first_successes, first_counts, ""),
            **_solve_rates(all_successes, self.n + added, "_after"),
            "per_prompt": float(self._per_prompt.mean()),
            "seconds_first": planned - start,
            "seconds_added": end - planned,
        }
        return rollouts

    def _plan(self, trainer: Trainer, ids: Tensor, first_successes: np.ndarray) -> tuple[np.ndarray, slice]:
        """The rollouts to add to the prompts of all processes, in the order of ranks, and the prompts of this one."""
        start = sum(gather_sizes(trainer, len(ids))[: trainer.global_rank])
        all_ids = gather_rows(trainer, ids).tolist()
        counted = gather_rows(trainer, torch.from_numpy(first_successes)).numpy()
        estimated = counted
        if self.memory is not None:
            estimated = self.memory.successes(all_ids, counted, self.n)
            self.memory.update(all_ids, counted.tolist(), self.n)
        return plan(self.schedule, estimated, self.n, self._total(len(all_ids))), slice(start, start + len(ids))

    def _total(self, prompts: int) -> int | None:
        """The budget of a number of prompts."""
        return None if self.budget is None else int(self.budget * prompts)

    # ------------------------------------------------------------------ the forecast, and metrics

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forecast what each schedule would do."""
        if not self.preflight or trainer.ckpt_path is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            rank_zero_info("DifficultyAdaptiveRollouts makes no forecast: that needs one map-style data loader.")
            return
        counted = self._first_successes(trainer, pl_module, loader)
        made = self.n * len(counted)
        if not counted.any():
            rank_zero_warn(
                f"DifficultyAdaptiveRollouts makes no forecast: none of {made} rollouts of {len(counted)} prompts "
                "earned a reward, and a policy without rewards learns nothing. Warm it up, or take easier prompts."
            )
            return
        accuracy = accuracies(counted, self.n)
        lines = [
            f"accuracy {counted.sum() / made:.2f} over {len(counted)} prompts; expected per prompt and step, with "
            "half a success and half a failure added to each prompt:"
        ]
        rows: list[list[Any]] = []
        forecasts = compare_schedules(self.schedule, accuracy, self.n, self._total(len(counted)))
        for name, f in forecasts.items():
            lines.append(
                f"  {name:24} {f.rollouts:6.1f} rollouts, {f.all_wrong:6.1%} all wrong, {f.all_right:6.1%} all right"
            )
            rows.append([name, f.rollouts, f.all_wrong, f.all_right])
        rank_zero_info("DifficultyAdaptiveRollouts: " + "\n".join(lines))
        log_table(trainer, "rollouts/preflight", ["schedule", "rollouts", "all wrong", "all right"], rows)

    def _first_successes(self, trainer: Trainer, pl_module: LightningModule, loader: DataLoader) -> np.ndarray:
        """The successes of ``n`` rollouts of some prompts, fp64 ``[P]``; weights and random streams do not change."""
        counted: list[float] = []
        # A loader of its own: the fit may already iterate over the other one.
        generator = torch.Generator().manual_seed(0)
        shuffled = DataLoader(
            loader.dataset, loader.batch_size or 1, True, collate_fn=loader.collate_fn, generator=generator
        )
        with rng.isolated(), ExitStack() as stack:
            stack.callback(setattr, trainer, "training", True)
            trainer.training = False  # as in evaluation, so that no memory is updated
            for batch in shuffled:
                batch = move_to_device(trainer, split_sample_ids(batch)[0])
                prompts = batch_size(batch)
                counts = np.full(prompts, self.n)
                rollouts = check_rollouts(pl_module.rollout(batch, counts), counts)  # type: ignore[operator]
                counted += successes(rollouts, prompts).tolist()
                if len(counted) >= self.preflight:
                    break
        return np.array(counted)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics of the step."""
        if not self._metrics and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"DifficultyAdaptiveRollouts changes nothing: {type(pl_module).__name__}.training_step did not call "
                "`self.rollout(batch, counts)`."
            )
        for name, value in self._metrics.items():
            pl_module.log(f"rollouts/{name}", value, on_step=True, on_epoch=False, batch_size=1, sync_dist=True)
        if self._metrics and logs_now(trainer):
            log_histogram(trainer, "rollouts/per_prompt_histogram", self._per_prompt.tolist())
        self._metrics = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's ``rollout``."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The observations of each prompt, equal on all ranks."""
        return {"memory": {} if self.memory is None else dict(self.memory.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the observations."""
        if self.memory is not None:
            self.memory.counts = dict(state["memory"])


def _solve_rates(solved: np.ndarray, n: np.ndarray, suffix: str) -> dict[str, float]:
    """The values of :class:`SolveRate`, their names with a suffix."""
    metric = SolveRate()
    metric.update(torch.from_numpy(solved), torch.from_numpy(n))
    return {f"{name}{suffix}": float(rate) for name, rate in metric.compute().items()}
