"""What a run says of its data: wrong labels, forgotten samples, conflicting duplicates, hard parts."""

from curation.audit.conflicts import conflicting_pairs
from curation.audit.corrections import CorrectedDataset, Corrections
from curation.audit.estimate import (
    UnsupportedError,
    WrongLabels,
    below_threshold,
    estimate_wrong,
    wrong_by_mixture,
    wrong_by_threshold_samples,
)
from curation.audit.labels import label_of, with_label
from curation.audit.scores import (
    area_under_margin,
    cartography_regions,
    errors_are_learned,
    forgetting_counts,
    normalized_margin,
    self_confidence,
    slices,
    suspicion,
)
from curation.audit.threshold_samples import ThresholdSamples

__all__ = [
    "CorrectedDataset",
    "Corrections",
    "ThresholdSamples",
    "UnsupportedError",
    "WrongLabels",
    "area_under_margin",
    "below_threshold",
    "cartography_regions",
    "conflicting_pairs",
    "errors_are_learned",
    "estimate_wrong",
    "forgetting_counts",
    "label_of",
    "normalized_margin",
    "self_confidence",
    "slices",
    "suspicion",
    "with_label",
    "wrong_by_mixture",
    "wrong_by_threshold_samples",
]
