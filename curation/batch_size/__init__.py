"""Batch sizes that change in a fit: schedules, and what the noise of gradients says."""

from curation.batch_size.noise_scale import Moments, MovingMoments, gradient_moments, wanted_rows
from curation.batch_size.schedules import (
    COUPLINGS,
    SCHEDULES,
    batches_within,
    count_steps,
    doubling,
    next_size,
    ramp,
    seesaw,
    steps,
    window_sizes,
)

__all__ = [
    "COUPLINGS",
    "SCHEDULES",
    "Moments",
    "MovingMoments",
    "batches_within",
    "count_steps",
    "doubling",
    "gradient_moments",
    "next_size",
    "ramp",
    "seesaw",
    "steps",
    "wanted_rows",
    "window_sizes",
]
