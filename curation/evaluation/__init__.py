"""Evaluation: intervals, time to a target, cost ratios, performance profiles, retention."""

from curation.evaluation.cost_ratio import CostRatio, cost_ratio, fit_curve
from curation.evaluation.retention import Retention, retention
from curation.evaluation.statistics import paired_interval, performance_profile, time_to_target

__all__ = [
    "CostRatio",
    "Retention",
    "cost_ratio",
    "fit_curve",
    "paired_interval",
    "performance_profile",
    "retention",
    "time_to_target",
]
