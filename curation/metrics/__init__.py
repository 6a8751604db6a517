"""Torchmetrics of what was trained on."""

from curation.metrics.concept_coverage import ConceptCoverage, plot_concepts
from curation.metrics.experts import ExpertLoad, ExpertSpecialization
from curation.metrics.rollouts import PassAtK, SolveRate

__all__ = [
    "ConceptCoverage",
    "ExpertLoad",
    "ExpertSpecialization",
    "PassAtK",
    "SolveRate",
    "plot_concepts",
]
