"""What a fit costs and what it reaches, so that fits can be compared."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from curation.batch import batch_size
from curation.callbacks.instances.instance_selection import InstanceSelection
from curation.callbacks.lightning.collectives import Totals
from curation.callbacks.lightning.loop import wait_for
from curation.callbacks.lightning.seam import SeamClient, check_training_step
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.runs.flop_count import FlopCount
from curation.checks import check_flag, check_integer, check_number, check_path
from curation.files import replacing


class RunMeter(SeamClient):
    """Writes costs and metrics at every validation to a JSON file, and ends the fit when its budget is spent.

    Evaluation is off the clock; selection, loading and logging are on it. When the budget is spent Lightning
    validates once more, so the last point is that of the final weights. Without a budget the fit ends as it would.

    The file holds ``points``, a list with ``step`` (optimizer steps), ``seconds``, ``samples_trained`` and
    ``samples_scored`` (of all processes) and ``metrics`` (every number that was logged since the point before, so
    none that was measured on earlier weights only); ``finished``; ``steps``; ``wall_seconds`` (with evaluation);
    ``peak_memory`` (bytes: of a GPU's tensors while training, or of the process on a CPU, imports included);
    ``device``; ``torch``. It is replaced as a whole, so a killed fit leaves a readable file.

    Rows are counted when the step has trained on them. A batch whose rows cannot be counted, such as one of data
    loaders with other batch sizes or one of texts only, is left out of ``samples_trained``, with a warning.

    Args:
        path: The JSON file to write.
        max_steps: Optimizer steps after which the fit ends; None for no such budget.
        max_seconds: Training seconds after which the fit ends, at the next optimizer step, by the clock of rank 0;
            None for no such budget.
        count_flops: Count floating-point operations with torch's own counter (matrix products, convolutions and
            attention, of all processes) and add ``flops_per_step``, ``seconds_per_step``, ``steps_per_epoch`` and
            ``total_steps`` (of the whole fit, as Lightning estimates it) to the file. Counting slows the fit, so the
            seconds mean nothing then.

    Attributes:
        points: The points so far.
        samples: Samples that all processes trained on.
        seconds: Training seconds.

    Raises:
        ValueError: If ``max_steps`` is no positive integer, ``max_seconds`` not in (0, inf), or another argument of a
            wrong type.

    Example:
        >>> meter = RunMeter("runs/full/run.json", max_steps=1_000)
        >>> callbacks = [meter]  # Trainer(callbacks=callbacks, max_epochs=-1).fit(module, loader, val_loader)
        >>> RunMeter("run.json", max_steps=2.5)
        Traceback (most recent call last):
        ValueError: Argument `max_steps` must be an integer >= 1 or None, but got 2.5.
    """

    def __init__(
        self,
        path: str | Path,
        max_steps: int | None = None,
        max_seconds: float | None = None,
        count_flops: bool = False,
    ) -> None:
        self.path: str = check_path("path", path)
        self.max_steps: int | None = check_integer("max_steps", max_steps, 1, optional=True)
        self.max_seconds: float | None = check_number("max_seconds", max_seconds, "(0, inf)", optional=True)
        self.count_flops = check_flag("count_flops", count_flops)
        self._reset()

    def _reset(self) -> None:
        self.points: list[dict[str, Any]] = []
        self._trained = Totals(0, 0)  # samples and FLOPs of all processes, up to the last batch that was trained on
        self.seconds = 0.0
        self._clock = 0.0
        self._steps = 0
        self._rows = 0  # of the current batch
        self._warned = False
        self._logged: dict[str, Tensor] = {}  # metrics at the last point
        self._flops = FlopCount()  # of this process
        self._flops_trained = 0  # of them, in the totals
        self._peak = 0
        self._extra: dict[str, Any] = {}
        self._began = time.perf_counter()

    @property
    def samples(self) -> int:  # noqa: D102 - see Attributes
        return int(self._trained.values[0])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; strip sample ids, also where nothing is selected."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam; after an exception the file stays as it was at the last validation."""
        super().teardown(trainer, pl_module, stage)
        self._flops.stop()

    # ------------------------------------------------------------------ cost

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; instances may have been selected before."""
        self._steps = trainer.global_step
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.seconds += sum(c.seconds for c in callbacks if isinstance(c, InstanceSelection))
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if self.count_flops:
            self._extra["total_steps"] = trainer.estimated_stepping_batches
            self._extra["steps_per_epoch"] = trainer.num_training_batches / trainer.accumulate_grad_batches
        self._clock = time.perf_counter()

    def before_transfer(self) -> None:
        """Count the FLOPs of this batch and of the following ones, until the next validation."""
        if self.count_flops:
            self._flops.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the rows, which the training step may take out of the batch."""
        self._rows = self._count(pl_module, batch)

    def _count(self, pl_module: LightningModule, batch: Any) -> int:
        try:
            check_training_step(pl_module)
            return batch_size(batch)
        except (TypeError, ValueError) as error:
            if not self._warned:
                rank_zero_warn(f"RunMeter leaves batches out of `samples_trained` that it cannot count: {error}")
            self._warned = True
            return 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the rows; end the fit if the budget is spent."""
        flops = self._flops.total
        self._trained.add(trainer, 0 if batch is None else self._rows, flops - self._flops_trained)
        self._flops_trained = flops
        self._tick()
        if trainer.global_step == self._steps:
            return  # a micro-batch
        self._steps = trainer.global_step
        spent = self.max_steps is not None and self._steps >= self.max_steps
        if self.max_seconds is not None:
            spent = spent or bool(trainer.strategy.broadcast(self.seconds >= self.max_seconds))
        if spent:
            trainer.should_stop = True  # Lightning validates then,
            if trainer.check_val_every_n_epoch:
                trainer.check_val_every_n_epoch = 1  # in any epoch

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    # ------------------------------------------------------------------ what it reaches

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and the counter; loaders and their workers have been started since the last batch ended."""
        self._flops.stop()
        if self._measures(trainer):
            self._clock = time.perf_counter()
            wait_for(pl_module.device)
            self._tick()
            self._peak = max(self._peak, _peak_memory(pl_module.device))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a point."""
        if not self._measures(trainer):
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        scored = sum(c.samples_scored for c in callbacks if isinstance(c, OnlineSelection))
        self._trained.add(trainer, 0, self._flops.total - self._flops_trained)
        self._flops_trained = self._flops.total
        trained, flops = self._trained.values.tolist()
        earlier, self._logged = self._logged, dict(trainer.callback_metrics)  # Lightning keeps the values of old ones
        self.points.append(
            {
                "step": trainer.global_step,
                "seconds": self.seconds,
                "samples_trained": trained,
                "samples_scored": scored,
                "metrics": {k: float(value) for k, value in self._logged.items() if value is not earlier.get(k)},
            }
        )
        if self.count_flops:
            steps = max(trainer.global_step, 1)
            self._extra |= {"flops_per_step": flops / steps, "seconds_per_step": self.seconds / steps}
        self._write(trainer, finished=False)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._clock = time.perf_counter()

    def _measures(self, trainer: Trainer) -> bool:
        return self.fitting and not trainer.sanity_checking

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the file as that of a fit that came to its end."""
        self._peak = max(self._peak, _peak_memory(pl_module.device))
        self._write(trainer, finished=True)

    def _write(self, trainer: Trainer, finished: bool) -> None:
        if not trainer.is_global_zero:
            return
        device = trainer.strategy.root_device
        on_gpu = device.type == "cuda"
        content = {
            "points": self.points,
            "finished": finished,
            "steps": trainer.global_step,
            "wall_seconds": time.perf_counter() - self._began,
            "peak_memory": self._peak,
            "device": torch.cuda.get_device_name(device)
            if on_gpu
            else f"{platform.machine()} CPU ({torch.get_num_threads()} of {os.cpu_count()} cores)",
            "torch": torch.__version__,
            **self._extra,
        }
        with replacing(self.path) as file:
            file.write_text(json.dumps(content))

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far; samples and FLOPs are those of all processes, seconds those of rank 0."""
        samples, flops = self._trained.values.tolist()
        return {"points": self.points, "samples": samples, "seconds": self.seconds, "flops": flops}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on measuring."""
        self.points = list(state["points"])
        self._trained = Totals(state["samples"], state.get("flops", 0))  # older checkpoints have no FLOPs
        self.seconds = state["seconds"]


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the tensors on a GPU since the last reset, or of this process on a CPU, where Linux tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # `getrusage` would also count the process that started this one
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
