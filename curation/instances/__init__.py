"""Instance selection: which samples of a data set stay at all."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curation.instances.selectors import (
        CoverageInstanceSelector,
        EditedNearestNeighboursFilter,
        GraphAttentionInstanceSelector,
        StratifiedRandomSelector,
    )

__all__ = [
    "CoverageInstanceSelector",
    "EditedNearestNeighboursFilter",
    "GraphAttentionInstanceSelector",
    "StratifiedRandomSelector",
]


def __getattr__(name: str) -> Any:
    """Selectors need scikit-learn; what reads their files does not."""
    if name in __all__:
        return getattr(import_module("curation.instances.selectors"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
