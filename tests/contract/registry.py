"""Every public callback, and what the contract suite needs to know of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from helpers import (
    Accumulating,
    Answering,
    Classifier,
    ManualAccumulating,
    ManualAnswering,
    ManualClassifier,
    ManualRouted,
    Proxy,
    Routed,
    data,
)
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader, Dataset, Sampler
from twins import ConceptAwareTwin, HardSampleTwin, ProxyTwin, UniformTwin, UtilityDiversityTwin, tags

from curation.batch import SampleIds
from curation.callbacks import (
    BatchSizeScheduler,
    ConceptAwareSelection,
    ConceptCoverageMonitor,
    DifficultyAdaptiveRollouts,
    DynamicDataPruning,
    ExactResume,
    GlobalBatchLoadBalancing,
    HardBatchTraining,
    HardSampleSelection,
    InstanceSelection,
    ProxySelection,
    RunMeter,
    SampleRecord,
    SelectionLedger,
    TrainingDynamics,
    UniformSelection,
    UtilityDiversitySelection,
    WeightedLoss,
)
from curation.instances.selection_index import SelectionIndex, fingerprint
from curation.records.ledger import Ledger
from curation.samplers.concept_aware import ConceptAwareSampler, ConceptIndex
from curation.samplers.dynamic_pruning import DynamicDataPruningSampler
from curation.samplers.hard_batches import HardBatchSampler


class WithWeights(Dataset):
    """Pairs with a weight as a third element."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple:
        return (*self.samples[i], i % 3 / 2)


class Weighed(Classifier):
    """Trains without the callback, too, which takes the weights away."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


@dataclass
class Entry:
    cls: type[Callback]
    arguments: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, Any] = field(default_factory=dict)
    twin: Callable[[], UniformTwin] | None = None
    modules: dict[str, type[LightningModule]] = field(default_factory=dict)  # arguments that are modules
    records: bool = False  # a selection, which has to stand beside it
    sampler: Callable[..., Sampler] | None = None  # of the training data, by data set and batch size
    candidates: int = 1  # batches of samples that it takes to make one to train on
    ids: bool = False  # it needs them
    weights: bool = False  # it takes them out of batches
    refuses: dict[str, str] = field(default_factory=dict)  # by kind of run, what the error says
    warns: dict[str, str] = field(default_factory=dict)  # where it does not do its work, what the warning says
    module: type[Classifier] = Classifier
    manual: type[Classifier] = ManualClassifier
    waits: int = 0  # of the host for a GPU, in a round of four batches
    acted: Callable[[Any], bool] = lambda callback: callback.batches > 0  # whether it did something in a fit

    def make(self, **changes: Any) -> Callback:
        return self.cls(**{**self.arguments, **{name: made() for name, made in self.modules.items()}, **changes})

    def in_trainer(self) -> list[Callback]:
        return [self.make(), *([UniformSelection(keep=0.25)] if self.records else [])]

    @property
    def name(self) -> str:
        told = [str(self.arguments[name]) for name in ("rule", "candidate_batches") if name in self.arguments]
        return "-".join([self.cls.__name__, *told])

    @property
    def title(self) -> str:
        """With what tells it from other entries of its class."""
        told = [
            f"{name}={self.arguments[name]!r}" for name in ("rule", "candidate_batches") if name in self.arguments
        ]
        return f"{self.cls.__name__}({', '.join(told)})".replace("'", '"')

    @property
    def joined(self) -> int:
        """Batches of the loader that make one candidate batch."""
        return self.arguments.get("candidate_batches", 1)

    @property
    def selects(self) -> bool:
        return "keep" in self.arguments

    def dataset(self, samples: Any) -> Any:
        samples = WithWeights(samples) if self.weights else samples
        return SampleIds(samples) if self.curates or self.ids else samples

    def loader(self, samples: Any = None, batch_size: int = 8, **kwargs: Any) -> DataLoader:
        dataset = self.dataset(data(64 * self.candidates) if samples is None else samples)
        if self.arguments.get("index") == EVERY_SECOND:
            write_every_second(dataset)
        how = {"shuffle": True} if self.sampler is None else {"sampler": self.sampler(dataset, batch_size)}
        return DataLoader(dataset, batch_size // self.joined, **how, **kwargs)

    def refusal(self, kind: str) -> str | None:
        """What the error says of that kind of run or that strategy; None where it works."""
        of_selections = {**FSDP1, **NO_SAMPLES} if self.curates else {}
        return {**DEEPSPEED, **of_selections, **self.refuses}.get(kind)

    @property
    def curates(self) -> bool:
        return self.selects or self.records


TAGS = "tags.arrow"  # in the current folder


def write_tags(samples: int) -> None:
    """Concepts for some tests' callbacks; other processes may be reading the file."""
    ConceptIndex.from_lists(map(tags, range(samples))).save(f"{os.getpid()}.arrow")
    os.replace(f"{os.getpid()}.arrow", TAGS)


EVERY_SECOND = "every-second.parquet"  # in the current folder


def write_every_second(dataset: Any) -> None:
    """The even samples of a data set."""
    indices = np.arange(0, len(dataset), 2)
    ranks = np.arange(len(indices))
    SelectionIndex(indices, np.zeros(len(indices)), ranks, len(dataset), fingerprint(dataset)).save(EVERY_SECOND)


def concept_aware_sampler(dataset: Any, batch_size: int) -> Sampler:
    concepts = ConceptIndex.from_lists(map(tags, range(len(dataset))))
    return ConceptAwareSampler(concepts, batch_size, 2 * batch_size, visit_penalty=0.1)


DEEPSPEED = {"deepspeed": "does not support DeepSpeedStrategy"}
FSDP1 = {"fsdp1": "does not support FSDPStrategy"}
NO_SAMPLES = {"samples": "list of 8 samples"}
NO_PENALTY = {"auxiliary_loss": "a part of it is not made of the logits"}
ONE_LOADER = {"combined_loader": "needs one training data loader"}
SETS_THE_SIZE = {
    "accumulation_schedule": "and so would GradientAccumulationScheduler",
    "batch_size_finder": "and so would BatchSizeFinder",
}
NOT_OF_ROUNDS = {
    **ONE_LOADER,
    **NO_SAMPLES,
    **NO_PENALTY,
    "unequal_ranks": "drew 8 samples for a batch that has",
    "batch_size_finder": "rounds of the checkpoint are others",
    "overfit_batches": "overfit_batches",
}
NOT_OF_HARD_BATCHES = {
    **ONE_LOADER,
    "batch_size_finder": "mini-batches of the checkpoint are others",
    "manual": "must return its loss",
    "overfit_batches": "overfit_batches",
    "two_optimizers": "must return its loss",
}


def is_ranked(training: HardBatchTraining) -> bool:
    return bool(training.sampler.losses.isfinite().any())


CALLBACKS = {
    entry.name: entry
    for entry in (
        Entry(UniformSelection, {"keep": 0.25}, {"keep": 0.0}, UniformTwin),
        Entry(UtilityDiversitySelection, {"keep": 0.25}, {"alpha": -1.0}, UtilityDiversityTwin),
        *(
            Entry(
                HardSampleSelection,
                {"keep": 0.25, "rule": rule, **options},
                {"pressure": 0.5},
                partial(HardSampleTwin, rule, **options),
                refuses={**NO_PENALTY, **ONE_LOADER} if rule == "importance" else {},
            )
            for rule, options in {
                "top": {},
                "rank": {},
                "proportional": {},
                "drop_high": {},
                "selective_backprop": {},
                "importance": {"score": "grad_norm"},
            }.items()
        ),
        Entry(
            UniformSelection,
            {"keep": 0.25, "candidate_batches": 4},
            {"keep": 0.5},
            UniformTwin,
            refuses={"samples": "list of 2 samples"},
        ),
        Entry(
            HardSampleSelection,
            {"keep": 0.25, "rule": "top", "candidate_batches": 4},
            {"candidate_batches": 0},
            partial(HardSampleTwin, "top"),
            refuses={"samples": "list of 2 samples"},
        ),
        Entry(
            BatchSizeScheduler,
            {"schedule": "doubling", "growth": 2, "over": 0.7},
            {"growth": 1},
            refuses={**ONE_LOADER, **FSDP1, **NO_SAMPLES, **SETS_THE_SIZE},
            acted=lambda scheduler: (
                len(scheduler.sizes) == 1 + (scheduler.batches > 0.7 * scheduler._total)  # early stops come before
            ),
            module=Accumulating,
            manual=ManualAccumulating,
        ),
        Entry(ConceptAwareSelection, {"keep": 0.25, "concepts": TAGS}, {"keep": -1.0}, ConceptAwareTwin),
        Entry(
            ConceptCoverageMonitor,
            sampler=concept_aware_sampler,
            candidates=2,
            ids=True,
            acted=lambda monitor: int(monitor.visits.sum()) > 0,
            refuses={"overfit_batches": "overfit_batches", "samples": "needs sample ids"},
        ),
        Entry(
            DifficultyAdaptiveRollouts,
            {"n": 2, "preflight": 4},
            {"n": 0},
            refuses={**FSDP1, **NO_SAMPLES},
            acted=lambda rollouts: rollouts._per_prompt.max() > 2,
            module=Answering,
            manual=ManualAnswering,
        ),
        Entry(
            DynamicDataPruning,
            {"lr_scale": 0.5},
            {"lr_scale": 2.0},
            sampler=DynamicDataPruningSampler,
            refuses=NOT_OF_ROUNDS,
            acted=lambda pruning: bool(pruning.sampler.losses.isfinite().any()),
        ),
        Entry(ExactResume),
        Entry(
            GlobalBatchLoadBalancing,
            {"estimator": "warm"},
            {"coefficient": -1.0},
            acted=lambda balancing: int(balancing.window.counts.sum()) > 0,
            module=Routed,
            manual=ManualRouted,
        ),
        Entry(HardBatchTraining, sampler=HardBatchSampler, refuses=NOT_OF_HARD_BATCHES, waits=1, acted=is_ranked),
        Entry(
            InstanceSelection,
            {"index": EVERY_SECOND},
            {"every_n_epochs": 0},
            candidates=2,
            refuses={"overfit_batches": "overfit_batches"},
            acted=lambda selection: len(selection.indices) == 64,
        ),
        Entry(
            ProxySelection,
            {"keep": 0.25, "update_every": 2},
            {"start": 1.0},
            ProxyTwin,
            modules={"proxy": Proxy},
            acted=lambda selection: selection.batches > 0 and selection.training.state_dict()["windows"] > 0,
        ),
        Entry(
            RunMeter,
            {"path": "run.json"},
            warns={"samples": "leaves batches out of `samples_trained` .* list of 8 samples"},
            acted=lambda meter: meter.samples > 0,
        ),
        Entry(SampleRecord, records=True, acted=lambda record: int(record.store.seen.sum()) > 0),
        Entry(
            SelectionLedger, {"path": "ledger"}, records=True, acted=lambda _: Ledger("ledger").rows().num_rows > 0
        ),
        Entry(
            TrainingDynamics,
            {"path": "dynamics.parquet"},
            {"size": 0},
            ids=True,
            refuses={**ONE_LOADER, "samples": "needs sample ids"},
            acted=lambda dynamics: int(dynamics.store.visits.sum()) > 0,
        ),
        Entry(
            WeightedLoss,
            {"column": 2},
            {"column": -1},
            weights=True,
            refuses={**ONE_LOADER, **NO_PENALTY, "samples": "it has no 2"},
            module=Weighed,
        ),
    )
}
NOT_CALLBACKS = {
    *("OnlineSelection", "SeamClient", "SelectionListener", "Choice"),  # for callbacks of one's own
    *("SelectedDataModule", "embed"),
    *("FinalCheckpoint", "same_wandb_run"),  # in tests/callbacks/runs/test_final_checkpoint.py
    "TokenMeter",  # of texts, in tests/callbacks/runs/test_token_meter.py
    "TokenWeightedLoss",  # of texts, in tests/callbacks/online/test_weighted_loss.py
    "AdaptiveBatchSize",  # whose steps have two batches at least, in tests/callbacks/batch_size
    "SampleTable",  # of W&B alone, in tests/callbacks/records/test_sample_table.py
    *("ReplaySelection", "SelectionRehearsal"),  # of two runs, in tests/callbacks/online/test_replay.py
}
