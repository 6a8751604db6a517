"""What a fit costs and what it reaches, so that fits can be compared."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from curation.batch import batch_size
from curation.callbacks.instances.instance_selection import InstanceSelection
from curation.callbacks.lightning.seam import BatchSeam, SeamClient
from curation.callbacks.online.online_selection import OnlineSelection, wait_for


class RunMeter(SeamClient):
    """Writes costs and metrics at every validation to a JSON file, and ends the fit when its budget is spent.

    Evaluation is off the clock; selection, loading and logging are on it. When the budget is spent Lightning
    validates once more, so the last point is that of the final weights. Without a budget the fit ends as it would.

    The file holds ``points``, a list with ``step`` (optimizer steps), ``seconds``, ``samples_trained`` and
    ``samples_scored`` (of all processes) and ``metrics`` (every number that was logged so far); ``finished``;
    ``steps``; ``wall_seconds`` (with evaluation); ``peak_memory`` (bytes: of a GPU's tensors while training, or of
    the process on a CPU); ``device``; ``torch``. It is replaced as a whole, so a killed fit leaves a readable one.

    Args:
        path: Of the file.
        max_steps: Optimizer steps after which the fit ends.
        max_seconds: Training seconds after which it ends, at the next optimizer step. Rank 0's clock decides.
        count_flops: Count floating-point operations with torch's own counter (matrix products, convolutions and
            attention, of all processes) and add ``flops_per_step``, ``seconds_per_step``, ``steps_per_epoch`` and
            ``total_steps`` (of the whole fit, as Lightning estimates it) to the file. Counting slows the fit, so the
            seconds mean nothing.

    Raises:
        ValueError: If a budget is not positive.
    """

    def __init__(
        self, path: str, max_steps: int | None = None, max_seconds: float | None = None, count_flops: bool = False
    ) -> None:
        for name, value in (("max_steps", max_steps), ("max_seconds", max_seconds)):
            if value is not None and not value > 0:
                raise ValueError(f"Argument `{name}` must be > 0 or None, but got {value!r}.")
        self.path = path
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self.count_flops = count_flops
        self._reset()

    def _reset(self) -> None:
        self.points: list[dict[str, Any]] = []
        self.samples = 0  # trained on by this process
        self.seconds = 0.0
        self._clock = 0.0
        self._steps = 0
        self._flops = 0  # of this process
        self._counter: FlopCounterMode | None = None
        self._peak = 0
        self._extra: dict[str, Any] = {}
        self._began = time.perf_counter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; strip sample ids, also where nothing is selected."""
        self.fitting = stage == "fit"
        if self.fitting:
            self._reset()
        BatchSeam.attach(trainer, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam; after an exception the file stays as it was at the last validation."""
        super().teardown(trainer, pl_module, stage)
        self._stop_counting()

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
        """Count the operations of this batch and of those that follow, until the next validation."""
        if self.count_flops and self._counter is None:
            aten = torch.ops.aten
            self._counter = FlopCounterMode(
                display=False,
                custom_mapping={  # torch's own formulas, which it does not yet apply to its attention on a CPU
                    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
                },
            )
            self._counter.__enter__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the rows."""
        self.samples += batch_size(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the fit if the budget is spent."""
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

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._flops += self._counter.get_total_flops()
            self._counter = None

    # ------------------------------------------------------------------ what it reaches

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and the counter; loaders and their workers have been started since the last batch ended."""
        self._stop_counting()
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
        counts = torch.tensor([self.samples, scored, self._flops], device=pl_module.device)
        trained, scored, flops = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self.points.append(
            {
                "step": trainer.global_step,
                "seconds": self.seconds,
                "samples_trained": trained,
                "samples_scored": scored,
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
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
        file = Path(self.path)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(content))
        new.replace(file)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far; the rows are those of rank 0."""
        measured = {"points": self.points, "samples": self.samples, "seconds": self.seconds}
        return {**measured, "flops": self._flops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on measuring, in a fit."""
        if self.fitting:
            self.points = list(state_dict["points"])
            self.samples = state_dict["samples"]
            self.seconds = state_dict["seconds"]
            self._flops = state_dict.get("flops", 0)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the tensors on a GPU since the last reset, or of this process on a CPU, where Linux tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # `getrusage` would also count the process that started this one
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
