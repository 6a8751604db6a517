"""The kinds of runs in which every callback is tried: the columns of docs/strategies.md."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from helpers import Classifier, data, stack
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from contract.registry import Entry


@dataclass
class Kind:
    title: str
    options: dict[str, Any] = field(default_factory=dict)  # of the trainer
    callbacks: Callable[[], list[Callback]] = list
    module: Callable[[Entry], Any] = lambda entry: entry.module()
    loader: Callable[[Entry], Any] = lambda entry: entry.loader()
    seen: Callable[[Any], set[int]] = lambda module: set(module.seen)  # rows of the batches trained on, of 8
    needs: str = ""  # a package

    def trainer_options(self) -> dict[str, Any]:
        return {name: value() if name == "plugins" else value for name, value in self.options.items()}


QUIET = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}


def of_scaled_gradients() -> list[MixedPrecision]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]


def checkpointed(entry: Entry) -> Classifier:
    class Checkpointed(entry.module):  # type: ignore[name-defined]
        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    return Checkpointed()


def compiled(entry: Entry, **options: Any) -> Classifier:
    module = entry.module()
    module.net.compile(backend="aot_eager", **options)
    return module


def compiled_whole(entry: Entry) -> Any:
    class Uncompiled(entry.module):  # type: ignore[name-defined]
        log = torch.compiler.disable(entry.module.log)  # Lightning 2.6's own cannot be

    return torch.compile(Uncompiled(), backend="aot_eager")


def with_two_optimizers(entry: Entry) -> Classifier:
    class Two(entry.manual):  # type: ignore[name-defined]
        def configure_optimizers(self):
            return [torch.optim.SGD(p, lr=0.1) for p in (self.net[:2].parameters(), self.net[2:].parameters())]

    return Two()


def of_pairs(entry: Entry) -> Classifier:
    """The first of two loaders is trained on, and curated."""

    class Pairs(entry.module):  # type: ignore[name-defined]
        curated_loader = "a"

        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    return Pairs()


def tunable(entry: Entry) -> Classifier:
    class Tunable(entry.module):  # type: ignore[name-defined]
        batch_size, lr = 8, 0.1

        def train_dataloader(self):
            return entry.loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return DataLoader(entry.dataset(data(16)), 8)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Tunable()


def measuring(entry: Entry) -> Classifier:
    """Counts its rows in ``forward``."""

    class Measuring(entry.module):  # type: ignore[name-defined]
        def __init__(self):
            super().__init__()
            self.rows = SumMetric()

        def forward(self, x):
            self.rows.update(len(x))
            return super().forward(x)

    return Measuring()


def in_place(entry: Entry) -> Classifier:
    """Doubles what it is given; a row that had been given before would not be one of the data."""

    class InPlace(entry.module):  # type: ignore[name-defined]
        doubled = False

        def forward(self, x):
            return super().forward(x.mul_(2))

        def training_step(self, batch, batch_idx):
            rows = data(64 * entry.candidates).tensors[0]
            self.doubled |= not all((rows == row).all(1).any() for row in batch[0])
            return super().training_step(batch, batch_idx)

    return InPlace()


def adapted(entry: Entry) -> Classifier:
    """Trains adapters of its linear layers."""
    import peft

    module = entry.module()
    names = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names), module)
    module.before = {name: value.clone() for name, value in module.named_parameters()}
    return module


def trains_adapters_alone(module: Classifier) -> bool:
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, module.before[name])}
    return bool(changed) and all(".lora_" in name for name in changed)


def penalised(entry: Entry) -> Classifier:
    """A part of its loss is not made of its logits."""

    class Penalised(entry.module):  # type: ignore[name-defined]
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 1e-3 * self.net[0].weight.square().sum()

    return Penalised()


def of_samples(entry: Entry) -> Classifier:
    """Stacks its samples itself."""

    class OfSamples(entry.module):  # type: ignore[name-defined]
        def training_step(self, batch, batch_idx):
            return super().training_step(stack(batch), batch_idx)

    return OfSamples()


def averaging() -> list[Callback]:
    return [callbacks.EMAWeightAveraging(decay=0.9)]


KINDS = {
    "barebones": Kind("`barebones`", {"barebones": True, "log_every_n_steps": None, **QUIET}),
    "fast_dev_run": Kind("`fast_dev_run`", {"fast_dev_run": 3}),
    "overfit_batches": Kind("`overfit_batches`", {"overfit_batches": 2}),
    "accumulate_grad_batches": Kind("accumulation, short last window", {"accumulate_grad_batches": 3}),
    "accumulation_schedule": Kind(
        "accumulation schedule", callbacks=lambda: [callbacks.GradientAccumulationScheduler({0: 1, 1: 4})]
    ),
    "clipping": Kind("clipping", {"gradient_clip_val": 0.1}),
    "bf16_mixed": Kind("bf16-mixed", {"precision": "bf16-mixed"}),
    "bf16_true": Kind("bf16-true", {"precision": "bf16-true"}),
    "fp16_mixed": Kind("16-mixed, with a scaler", {"plugins": of_scaled_gradients}),
    "fp16_true": Kind("16-true", {"precision": "16-true"}),
    "manual": Kind("manual optimization", module=lambda entry: entry.manual()),
    "two_optimizers": Kind("two optimizers", module=with_two_optimizers),
    "compile": Kind("a compiled network", module=compiled),
    "compile_static": Kind("a compiled network, `dynamic=False`", module=partial(compiled, dynamic=False)),
    "compile_module": Kind("a compiled module", module=compiled_whole),
    "activation_checkpointing": Kind("activation checkpointing, non-reentrant", module=checkpointed),
    "combined_loader": Kind(
        "`CombinedLoader`",
        module=of_pairs,
        loader=lambda entry: CombinedLoader({"a": entry.loader(), "b": entry.loader()}, "min_size"),
    ),
    "torchmetrics": Kind(
        "a metric of torchmetrics in `forward`",
        module=measuring,
        seen=lambda module: set(module.seen) if module.rows.compute() == sum(module.seen) else set(),
    ),
    "in_place": Kind(
        "a `forward` in place", module=in_place, seen=lambda module: set() if module.doubled else set(module.seen)
    ),
    "adapter": Kind(
        "adapters of peft (LoRA)",
        module=adapted,
        seen=lambda module: set(module.seen) if trains_adapters_alone(module) else set(),
        needs="peft",
    ),
    "auxiliary_loss": Kind("an auxiliary loss", module=penalised),
    "samples": Kind(
        "batches as lists of samples", module=of_samples, loader=lambda entry: entry.loader(collate_fn=list)
    ),
    "ema": Kind("`EMAWeightAveraging`", callbacks=averaging),
    "swa": Kind(
        "`StochasticWeightAveraging`",
        callbacks=lambda: [callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)],
        seen=lambda module: set(module.seen[:-8]),  # then those by which it updates statistics
    ),
    "batch_size_finder": Kind(
        "`BatchSizeFinder`",
        callbacks=lambda: [callbacks.BatchSizeFinder(max_trials=2, init_val=8, steps_per_trial=1)],
        module=tunable,
        loader=lambda entry: None,
        seen=lambda module: {module.seen[-1] * 8 // module.batch_size},
    ),
    "learning_rate_finder": Kind(
        "`LearningRateFinder`",
        callbacks=lambda: [callbacks.LearningRateFinder(num_training_steps=6)],
        module=tunable,
    ),
    "early_stopping": Kind(
        "`EarlyStopping`",
        {"max_epochs": 4},
        callbacks=lambda: [callbacks.EarlyStopping("train_loss", patience=1, min_delta=1e9)],
        seen=lambda module: set(module.seen) if len(module.seen) == 16 else set(),  # after two
    ),
}
