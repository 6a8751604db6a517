"""Samplers: the indices of each batch, chosen before anything is loaded."""

from curation.samplers.concept_aware import ConceptAwareSampler
from curation.samplers.concept_choice import (
    ConceptObjective,
    Diversity,
    FirstCome,
    Frequency,
    MovingTargets,
    choose_diverse,
    target_counts,
)
from curation.samplers.concept_clusters import cluster_concepts
from curation.samplers.concept_index import ConceptIndex
from curation.samplers.dynamic_pruning import DynamicDataPruningSampler
from curation.samplers.global_batch import GlobalBatchSampler
from curation.samplers.hard_batches import HardBatchSampler
from curation.samplers.length_grouped import LengthGroupedSampler, TokenBudgetSampler
from curation.samplers.lengths import lengths_of
from curation.samplers.narrowing import NarrowingSampler
from curation.samplers.prompts import PromptSampler
from curation.samplers.subset import SubsetSampler

__all__ = [
    "ConceptAwareSampler",
    "ConceptIndex",
    "ConceptObjective",
    "Diversity",
    "DynamicDataPruningSampler",
    "FirstCome",
    "Frequency",
    "GlobalBatchSampler",
    "HardBatchSampler",
    "LengthGroupedSampler",
    "MovingTargets",
    "NarrowingSampler",
    "PromptSampler",
    "SubsetSampler",
    "TokenBudgetSampler",
    "choose_diverse",
    "cluster_concepts",
    "lengths_of",
    "target_counts",
]
