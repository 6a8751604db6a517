"""Rollouts for learning from verifiable rewards: their number, their generation and their advantages."""

from curation.rollouts.advantages import Baseline, Normalizer, advantages, loss_weights
from curation.rollouts.allocation import (
    DifficultyMemory,
    EqualTreatment,
    HardnessWeighted,
    Neyman,
    Schedule,
    Uniform,
    fill,
    plan,
)
from curation.rollouts.generation import Completions, PromptCache, from_sequences, generate, prefill
from curation.rollouts.max_variance import max_variance
from curation.rollouts.pass_at_k import pass_at_k
from curation.rollouts.preflight import Forecast, accuracies, compare_schedules, forecast

__all__ = [
    "Baseline",
    "Completions",
    "DifficultyMemory",
    "EqualTreatment",
    "Forecast",
    "HardnessWeighted",
    "Neyman",
    "Normalizer",
    "PromptCache",
    "Schedule",
    "Uniform",
    "accuracies",
    "advantages",
    "compare_schedules",
    "fill",
    "forecast",
    "from_sequences",
    "generate",
    "loss_weights",
    "max_variance",
    "pass_at_k",
    "plan",
    "prefill",
]
