"""Rollouts for learning from verifiable rewards: how many, how they are generated, and what each is worth."""

from curation.rollouts.advantages import advantages, loss_weights
from curation.rollouts.allocation import (
    DifficultyMemory,
    EqualTreatment,
    HardnessWeighted,
    Neyman,
    Schedule,
    Uniform,
    plan,
)
from curation.rollouts.generation import Completions, PromptCache, from_sequences, generate, prefill
from curation.rollouts.pass_at_k import pass_at_k
from curation.rollouts.preflight import Forecast, accuracies, forecast

__all__ = [
    "Completions",
    "DifficultyMemory",
    "EqualTreatment",
    "Forecast",
    "HardnessWeighted",
    "Neyman",
    "PromptCache",
    "Schedule",
    "Uniform",
    "accuracies",
    "advantages",
    "forecast",
    "from_sequences",
    "generate",
    "loss_weights",
    "pass_at_k",
    "plan",
    "prefill",
]
