"""Instance selection: the samples of a data set that stay at all."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curation.instances.contamination import contaminated
    from curation.instances.duplicates import near_duplicates
    from curation.instances.feature_shards import FeatureShards
    from curation.instances.selection import Selection, check_selection, read_selection
    from curation.instances.selection_index import SelectionIndex, Selector, fingerprint
    from curation.instances.selector import InstanceSelector, class_budgets
    from curation.instances.selectors import (
        CoverageInstanceSelector,
        EditedNearestNeighboursFilter,
        GraphAttentionInstanceSelector,
        StratifiedRandomSelector,
    )
    from curation.instances.targeted import TargetedSelector

__all__ = [
    "CoverageInstanceSelector",
    "EditedNearestNeighboursFilter",
    "FeatureShards",
    "GraphAttentionInstanceSelector",
    "InstanceSelector",
    "Selection",
    "SelectionIndex",
    "Selector",
    "StratifiedRandomSelector",
    "TargetedSelector",
    "check_selection",
    "class_budgets",
    "contaminated",
    "fingerprint",
    "near_duplicates",
    "read_selection",
]
_MODULES = {
    **dict.fromkeys(("Selection", "check_selection", "read_selection"), "selection"),
    **dict.fromkeys(("SelectionIndex", "Selector", "fingerprint"), "selection_index"),
    **dict.fromkeys(("InstanceSelector", "class_budgets"), "selector"),
    "FeatureShards": "feature_shards",
    "TargetedSelector": "targeted",
    "contaminated": "contamination",
    "near_duplicates": "duplicates",
}


def __getattr__(name: str) -> Any:
    """Selectors need scikit-learn; a module that reads their files does not."""
    if name in __all__:
        return getattr(import_module(f"curation.instances.{_MODULES.get(name, 'selectors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
