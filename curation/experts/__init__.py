"""Load balancing of mixtures of experts: losses, counts and routers."""

from curation.experts.load_balancing import (
    Window,
    expert_counts,
    load_balancing_loss,
    probabilities,
    projection,
    sequence_loss,
    shares,
    z_loss,
)
from curation.experts.routers import Router, find_routers, selection_bias

__all__ = [
    "Router",
    "Window",
    "expert_counts",
    "find_routers",
    "load_balancing_loss",
    "probabilities",
    "projection",
    "selection_bias",
    "sequence_loss",
    "shares",
    "z_loss",
]
