"""Evaluation: intervals, time to a target, performance profiles, retention."""

from curation.evaluation.retention import Retention, retention
from curation.evaluation.statistics import paired_interval, performance_profile, time_to_target

__all__ = [
    "Retention",
    "paired_interval",
    "performance_profile",
    "retention",
    "time_to_target",
]
