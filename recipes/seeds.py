"""The seed of a run where an argument leaves it open."""

import os

from curation.checks import check_seed


def global_seed(seed: int | None) -> int:
    """A seed, or that of ``seed_everything`` for None.

    Raises:
        ValueError: If the seed is not an integer in [0, 2^63) or None.

    Example:
        >>> global_seed(7)
        7
    """
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else check_seed(seed)
