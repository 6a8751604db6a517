"""Rules of online batch selection: which rows of a candidate batch are trained on."""

from curation.online.break_even import BreakEven
from curation.online.concept_aware import diverse_rows
from curation.online.hard_samples import (
    cdf_power,
    floored_log_weights,
    low_score_sample,
    pareto_sample,
    priority_sample,
    rank_log_weights,
    successive_sample,
    variance_reduction,
)
from curation.online.nuclear_norm import gram_of_head, nuclear_norm, nuclear_norm_from_hidden, project_head
from curation.online.proxy import rank_correlation, share_of_operations, smaller_config
from curation.online.sketch import SketchMemory, cosine_projection, sign_projection, sketch
from curation.online.top import keep_count, largest, standardize, top_rows
from curation.online.utility_diversity import LengthTrend, UtilityDiversityScorer, utility_diversity

__all__ = [
    "BreakEven",
    "LengthTrend",
    "SketchMemory",
    "UtilityDiversityScorer",
    "cdf_power",
    "cosine_projection",
    "diverse_rows",
    "floored_log_weights",
    "gram_of_head",
    "keep_count",
    "largest",
    "low_score_sample",
    "nuclear_norm",
    "nuclear_norm_from_hidden",
    "pareto_sample",
    "priority_sample",
    "project_head",
    "rank_correlation",
    "rank_log_weights",
    "share_of_operations",
    "sign_projection",
    "sketch",
    "smaller_config",
    "standardize",
    "successive_sample",
    "top_rows",
    "utility_diversity",
    "variance_reduction",
]
