"""Load balancing of mixtures of experts: losses, counts and routers."""

from curation.experts.load_balancing import (
    bias_update,
    excess_loss,
    expert_counts,
    expert_fractions,
    load_balancing_loss,
    probabilities,
    raw_scores,
    sequence_loss,
    z_loss,
)
from curation.experts.router_scores import called_scores, fitting_scores
from curation.experts.router_statistics import RouterStatistics, balance_metrics, router_statistics, stack_counts
from curation.experts.routers import (
    Router,
    adds_balancing_loss,
    can_add_balancing_loss,
    find_routers,
    selection_bias,
)
from curation.experts.window import Window

__all__ = [
    "Router",
    "RouterStatistics",
    "Window",
    "adds_balancing_loss",
    "balance_metrics",
    "bias_update",
    "called_scores",
    "can_add_balancing_loss",
    "excess_loss",
    "expert_counts",
    "expert_fractions",
    "find_routers",
    "fitting_scores",
    "load_balancing_loss",
    "probabilities",
    "raw_scores",
    "router_statistics",
    "selection_bias",
    "sequence_loss",
    "stack_counts",
    "z_loss",
]
