"""One forward pass that scores a candidate batch and changes nothing."""

from curation.scoring.criterion import Criterion, find_criterion
from curation.scoring.heads import find_logits_maker, find_output_head, head_as_identity
from curation.scoring.losses import (
    IGNORED,
    compact,
    per_sample_from_hidden,
    per_sample_grad_norm,
    per_sample_loss,
)
from curation.scoring.outcomes import OUTCOMES, losses_alone, row_outcomes
from curation.scoring.routes import (
    Route,
    check_outputs,
    find_route,
    hugging_face_models,
    side_effect_free,
    step_route,
)

__all__ = [
    "IGNORED",
    "OUTCOMES",
    "Criterion",
    "Route",
    "check_outputs",
    "compact",
    "find_criterion",
    "find_logits_maker",
    "find_output_head",
    "find_route",
    "head_as_identity",
    "hugging_face_models",
    "losses_alone",
    "per_sample_from_hidden",
    "per_sample_grad_norm",
    "per_sample_loss",
    "row_outcomes",
    "side_effect_free",
    "step_route",
]
