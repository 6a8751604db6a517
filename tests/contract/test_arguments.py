"""Every public constructor refuses each wrong type and each value out of range, and says of which argument."""

import inspect
import math
import tempfile
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import Proxy
from lightning.pytorch import LightningDataModule

from contract.registry import CALLBACKS
from curation import (
    audit,
    batch_size,
    callbacks,
    evaluation,
    experts,
    instances,
    metrics,
    online,
    records,
    rollouts,
    samplers,
)
from curation.audit import Corrections
from curation.instances import CoverageInstanceSelector, InstanceSelector, SelectionIndex
from curation.records import DynamicsStore, LedgerWriter, SampleDynamics
from curation.samplers import ConceptIndex

PACKAGES = (
    audit,
    batch_size,
    callbacks,
    evaluation,
    experts,
    instances,
    metrics,
    online,
    records,
    rollouts,
    samplers,
)
NOT_CONSTRUCTED = {  # by users: results and state that the package makes
    "Choice",
    "Completions",
    "CostRatio",
    "UnsupportedError",
    "WrongLabels",
    "Forecast",
    "Moments",
    "PromptCache",
    "Retention",
    "Router",
    "Window",
}
CONCEPTS = ConceptIndex.from_lists([["a"], ["b"], ["a", "b"]])
FOLDER = tempfile.TemporaryDirectory()
FEATURES = f"{FOLDER.name}/features.parquet"
pq.write_table(pa.table({"features": [[0.0]]}), FEATURES)
DYNAMICS = SampleDynamics.of_store(DynamicsStore(3)).columns
VALID: dict[str, dict[str, Any]] = {  # arguments without a default
    "ConceptAwareSampler": {"concepts": CONCEPTS, "batch_size": 1, "super_batch_size": 2},
    "ConceptAwareSelection": {"keep": 0.5},
    "ConceptCoverage": {"num_concepts": 3},
    "CorrectedDataset": {"dataset": [0], "corrections": Corrections([1.0], [-1])},
    "Corrections": {"weights": [1.0], "labels": [-1]},
    "DynamicDataPruningSampler": {"dataset": range(9), "batch_size": 2},
    "DynamicsStore": {"size": 3},
    "ExpertLoad": {"experts": 2},
    "FeatureShards": {"files": FEATURES},
    "ExpertSpecialization": {"domains": 2, "experts": 2},
    "GlobalBatchSampler": {"samples": range(9), "seed": 0},
    "HardBatchSampler": {"dataset": range(9), "batch_size": 2},
    "HardSampleSelection": {"keep": 0.5},
    "MovingTargets": {"points": {0: "uniform", 9: "proportional"}},
    "InstanceSelection": {"selector": CoverageInstanceSelector()},
    "Ledger": {"path": "ledger"},
    "LedgerWriter": {"path": "ledger"},
    "LengthGroupedSampler": {"lengths": [1, 2], "batch_size": 1},
    "NarrowingSampler": {"ranking": [1, 0], "batch_size": 1, "steps": 2},
    "MovingMoments": {"decay": 0.9},
    "PassAtK": {"k": 2},
    "PromptMemory": {"size": 3},
    "PromptSampler": {"dataset": range(9), "batch_size": 2},
    "ProxySelection": {"keep": 0.5, "proxy": Proxy()},
    "ReplaySelection": {"choices": "ledger"},
    "RunMeter": {"path": "run.json"},
    "TokenWeightedLoss": {"tokens": 300},
    "ScoreStore": {"size": 3},
    "SampleTable": {"show": "text"},
    "SelectedDataModule": {"datamodule": LightningDataModule(), "index": "kept.parquet"},
    "SelectionIndex": {"indices": [0], "scores": [0.0], "ranks": [0], "size": 3},
    "SelectionLedger": {"path": "ledger"},
    "SelectionRehearsal": {"keep": 0.5},
    "SketchMemory": {"capacity": 4, "size": 2},
    "SubsetSampler": {"samples": range(9)},
    "TargetedSelector": {"targets": [[1.0]]},
    "SampleDynamics": {"columns": DYNAMICS},
    "ThresholdSamples": {"dataset": [("x", 0)] * 100, "classes": 2},
    "TrainingDynamics": {"path": "dynamics.parquet"},
    "TokenBudgetSampler": {"lengths": [1, 2], "max_tokens": 2},
    "Uniform": {"rollouts": 2},
    "UniformSelection": {"keep": 0.5},
    "UtilityDiversitySelection": {"keep": 0.5},
}
WRONG: dict[Any, tuple[Any, ...]] = {
    bool: (1, 0.0, "x", [True]),
    int: (True, 1.5, math.nan, math.inf, "x", [1]),
    float: (True, math.nan, math.inf, -math.inf, "x", [0.5]),
    str: (3, True, 1.5, ["x"]),
    Literal: ("no such choice", "", 3, True, ["x"]),
}
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "AdaptiveBatchSize.batch_size": (0,),
    "AdaptiveBatchSize.decay": (-0.1, 1),
    "AdaptiveBatchSize.eta": (0, -1.0),
    "AdaptiveBatchSize.every": (0,),
    "AdaptiveBatchSize.first": (0,),
    "AdaptiveBatchSize.growth": (0, 1),
    "BatchSizeScheduler.batch_size": (0,),
    "BatchSizeScheduler.first": (0,),
    "BatchSizeScheduler.growth": (0, 1),
    "BatchSizeScheduler.over": (0, 1.5),
    "ConceptAwareSampler.batch_size": (0, 3),
    "ConceptAwareSampler.seed": (-1,),
    "ConceptAwareSampler.super_batch_size": (0, 4),
    "ConceptAwareSampler.visit_penalty": (-0.1,),
    "ConceptAwareSelection.candidate_batches": (0,),
    "ConceptAwareSelection.keep": (0, 1.5),
    "ConceptAwareSelection.seed": (-1, 2**63),
    "ConceptCoverage.num_concepts": (0,),
    "ConceptCoverageMonitor.losses": (1,),
    "CoverageInstanceSelector.budget": (0, 1.5),
    "CoverageInstanceSelector.n_neighbors": (0,),
    "CoverageInstanceSelector.n_views": (0,),
    "CoverageInstanceSelector.memory": (0, "much"),
    "CoverageInstanceSelector.folder": (3,),
    "CoverageInstanceSelector.n_jobs": (0,),
    "CoverageInstanceSelector.verbose": (1,),
    "DifficultyAdaptiveRollouts.budget": (0, -1.0),
    "DifficultyAdaptiveRollouts.forgetting": (-0.1, 1),
    "DifficultyAdaptiveRollouts.n": (0,),
    "DifficultyAdaptiveRollouts.preflight": (-1,),
    "DifficultyMemory.forgetting": (-0.1, 1),
    "Diversity.cap": (0,),
    "DynamicsStore.size": (0,),
    "EditedNearestNeighboursFilter.n_neighbors": (0,),
    "EditedNearestNeighboursFilter.n_views": (0,),
    "EqualTreatment.max_rollouts": (0,),
    "ExpertLoad.experts": (0,),
    "ExpertSpecialization.domains": (0,),
    "DynamicDataPruning.lr_scale": (-1.5, 1.5),
    "DynamicDataPruningSampler.anneal": (-0.1, 1.1),
    "DynamicDataPruningSampler.batch_size": (0, 10),
    "DynamicDataPruningSampler.max_age": (0,),
    "DynamicDataPruningSampler.prune": (-0.1, 1),
    "DynamicDataPruningSampler.review": (-0.1, 1.1),
    "DynamicDataPruningSampler.seed": (-1, 2**63),
    "DynamicDataPruningSampler.smoothing": (-0.1, 1),
    "ExpertSpecialization.experts": (0,),
    "GlobalBatchLoadBalancing.accumulate": (0,),
    "GlobalBatchLoadBalancing.bias_rate": (-0.1,),
    "GlobalBatchLoadBalancing.coefficient": (-0.1,),
    "GlobalBatchLoadBalancing.micro_fraction": (-0.1, 1.1),
    "GlobalBatchLoadBalancing.top_k": (0,),
    "GlobalBatchLoadBalancing.z_coefficient": (-0.1,),
    "GlobalBatchSampler.seed": (-1,),
    "GraphAttentionInstanceSelector.budget": (0, 1.5),
    "GraphAttentionInstanceSelector.distance_quantile": (0, 1.5),
    "GraphAttentionInstanceSelector.edge_dropout": (-0.1, 1),
    "GraphAttentionInstanceSelector.epochs": (0,),
    "GraphAttentionInstanceSelector.lr": (0, -1),
    "GraphAttentionInstanceSelector.n_graphs": (0,),
    "GraphAttentionInstanceSelector.n_neighbors": (0,),
    "GraphAttentionInstanceSelector.n_views": (0,),
    "HardBatchSampler.batch_size": (0, 10),
    "HardBatchSampler.delta": (0, 1.5),
    "HardBatchSampler.max_age": (0,),
    "HardBatchSampler.seed": (-1, 2**63),
    "HardSampleSelection.candidate_batches": (0,),
    "HardSampleSelection.drop": (-0.1, 1),
    "HardSampleSelection.beta": (-0.1,),
    "HardSampleSelection.keep": (0, 1.5),
    "HardSampleSelection.pressure": (0.5, 1e13),
    "HardSampleSelection.seed": (-1, 2**63),
    "HardnessWeighted.max_rollouts": (0,),
    "InstanceSelection.every_n_epochs": (0,),
    "InstanceSelection.warmup_epochs": (-1,),
    "LedgerWriter.rank": (-1,),
    "LedgerWriter.rows_per_file": (0,),
    "MovingMoments.decay": (-0.1, 1),
    "Neyman.max_rollouts": (0,),
    "Neyman.rollouts": (0,),
    "LengthGroupedSampler.batch_size": (0,),
    "NarrowingSampler.batch_size": (0, 3),
    "NarrowingSampler.first": (0, 1.5),
    "NarrowingSampler.last": (0, 1.5),
    "NarrowingSampler.seed": (-1,),
    "NarrowingSampler.steps": (0,),
    "LengthGroupedSampler.seed": (-1,),
    "LengthGroupedSampler.window": (0,),
    "PassAtK.k": (0,),
    "PromptMemory.decay": (-0.1, 1.1),
    "PromptMemory.right": (-0.1, 1),
    "PromptMemory.size": (0,),
    "PromptMemory.wrong": (0, 1.1),
    "PromptSampler.anneal": (-0.1, 1.1),
    "PromptSampler.answers": (0,),
    "PromptSampler.batch_size": (0, 10),
    "PromptSampler.decay": (-0.1, 1.1),
    "PromptSampler.max_age": (0,),
    "PromptSampler.prune": (-0.1, 1),
    "PromptSampler.review": (-0.1, 1.1),
    "PromptSampler.right": (-0.1, 1),
    "PromptSampler.seed": (-1, 2**63),
    "PromptSampler.silent": (-0.1, 1.1),
    "PromptSampler.wrong": (0, 1.1),
    "ProxySelection.candidate_batches": (0,),
    "ProxySelection.drop": (-0.1, 1),
    "ProxySelection.beta": (-0.1,),
    "ProxySelection.end": (0, 1.5),
    "ProxySelection.keep": (0, 1.5),
    "ProxySelection.pressure": (0.5, 1e13),
    "ProxySelection.seed": (-1, 2**63),
    "ProxySelection.start": (-0.1, 1),
    "ProxySelection.start_loss": (),
    "ProxySelection.update_every": (0,),
    "RunMeter.max_seconds": (0, -1),
    "RunMeter.max_steps": (0, -1),
    "SampleRecord.size": (0,),
    "SampleTable.rows": (0, 1),
    "ScoreStore.size": (0,),
    "SelectionIndex.size": (0,),
    "SelectionRehearsal.drop": (-0.1, 1),
    "SelectionRehearsal.beta": (-0.1,),
    "SelectionRehearsal.keep": (0, 1.5),
    "SelectionRehearsal.pressure": (0.5, 1e13),
    "SelectionRehearsal.seed": (-1, 2**63),
    "SketchMemory.capacity": (0,),
    "SketchMemory.size": (0,),
    "StratifiedRandomSelector.budget": (0, 1.5),
    "SubsetSampler.seed": (-1,),
    "FeatureShards.memory": (0,),
    "TargetedSelector.agree": (0,),
    "TargetedSelector.budget": (0, 1.5),
    "TargetedSelector.sample": (0, 9),
    "ThresholdSamples.classes": (0, 1),
    "ThresholdSamples.seed": (-1,),
    "ThresholdSamples.share": (0, 1),
    "TrainingDynamics.size": (0,),
    "TokenBudgetSampler.max_tokens": (0, 1),
    "TokenWeightedLoss.tokens": (0, -1),
    "TokenBudgetSampler.seed": (-1,),
    "TokenBudgetSampler.window": (0,),
    "Uniform.rollouts": (0,),
    "UniformSelection.candidate_batches": (0,),
    "UniformSelection.keep": (0, 1.5),
    "UniformSelection.seed": (-1, 2**63),
    "UtilityDiversityScorer.alpha": (-0.1,),
    "UtilityDiversityScorer.seed": (-1, 2**63),
    "UtilityDiversitySelection.candidate_batches": (0,),
    "UtilityDiversitySelection.alpha": (-0.1, 1e7),
    "UtilityDiversitySelection.keep": (0, 1.5),
    "UtilityDiversitySelection.seed": (-1, 2**63),
}
FREE = {  # values that this table would refuse
    "InstanceSelection.index": {None},  # a selector stands in for it
    "RunMeter.max_seconds": {math.inf},
    "WeightedLoss.column": {3},  # the place of a column
}
LATE = {"ConceptAwareSelection.targets", "ConceptCoverageMonitor.targets"}  # need the concepts of the data set
FEATURES, CLASSES = np.arange(8.0)[:, None], np.repeat([0, 1], 4)


def public_classes() -> dict[str, type]:
    return {
        name: member
        for package in PACKAGES
        for name in package.__all__
        if inspect.isclass(member := getattr(package, name))
        and Protocol not in member.__bases__
        and not inspect.isabstract(member)
    }


def kind(hint: Any) -> tuple[Any, bool]:
    """Type of a scalar argument, one of ``WRONG``, or None if it is no scalar; and whether it may be None."""
    arms = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    optional = NoneType in arms
    scalars = [Literal if get_origin(arm) is Literal else arm for arm in arms - {NoneType}]
    if Literal in scalars:
        return Literal, optional
    if str in scalars and torch.device not in scalars:
        return str, optional  # beside a function or an object, too
    return (scalars[0] if len(scalars) == 1 and scalars[0] in WRONG else None), optional


def scalar_arguments(cls: type) -> dict[str, tuple[Any, bool]]:
    names = inspect.signature(cls).parameters
    hints = {name: hint for name, hint in get_type_hints(cls.__init__).items() if name in names}
    return {name: kind(hint) for name, hint in hints.items() if kind(hint)[0] is not None}


def cases() -> Iterator[Any]:
    for name, cls in public_classes().items():
        if name in NOT_CONSTRUCTED:
            continue
        for argument, (scalar, optional) in scalar_arguments(cls).items():
            key = f"{name}.{argument}"
            values = [*WRONG[scalar], *([] if optional else [None]), *OUT_OF_RANGE.get(key, ())]
            for value in values if key not in LATE else ():
                if not any(value is free or value == free for free in FREE.get(key, ())):
                    yield pytest.param(cls, argument, value, id=f"{key}={value!r}")


def make(cls: type, **changes: Any) -> Any:
    registered = {entry.cls.__name__: entry.arguments for entry in CALLBACKS.values()}
    made = cls(**{**VALID.get(cls.__name__, registered.get(cls.__name__, {})), **changes})
    return made.fit(FEATURES, CLASSES) if issubclass(cls, InstanceSelector) else made  # as scikit-learn wants it


@pytest.mark.parametrize(("cls", "argument", "value"), list(cases()))
def test_a_wrong_argument_is_named_with_its_value(cls, argument, value):
    with pytest.raises((ValueError, TypeError)) as caught:
        make(cls, **{argument: value})
    message = str(caught.value)
    assert message.startswith("Argument")
    assert f"`{argument}`" in message
    assert repr(value) in message


CONSTRUCTED = {name: cls for name, cls in public_classes().items() if name not in NOT_CONSTRUCTED}


@pytest.mark.parametrize("name", [name for name, cls in CONSTRUCTED.items() if scalar_arguments(cls)])
def test_the_arguments_of_the_table_are_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name != "InstanceSelector":  # selects nothing itself
        writer = LedgerWriter("ledger")
        writer.append(0, torch.tensor([1]), *torch.ones(3, 1))
        writer.close()
        SelectionIndex([0], [0.0], [0], size=3).save("kept.parquet")
        make(CONSTRUCTED[name])


def test_the_table_is_of_arguments_that_there_are():
    known = {f"{name}.{argument}" for name, cls in CONSTRUCTED.items() for argument in scalar_arguments(cls)}
    assert len(known) > 80
    assert set(OUT_OF_RANGE) | set(FREE) | LATE <= known
    assert set(VALID) <= set(CONSTRUCTED)
    assert set(public_classes()) >= NOT_CONSTRUCTED
    numbers = {
        f"{name}.{argument}"
        for name, cls in CONSTRUCTED.items()
        for argument, (scalar, _) in scalar_arguments(cls).items()
        if scalar in (int, float)
    }
    assert numbers <= set(OUT_OF_RANGE), f"no range is tried of {sorted(numbers - set(OUT_OF_RANGE))}"
