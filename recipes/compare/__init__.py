"""``curation compare``: every method over the same seeds, at one budget or several, in one report."""

from curation.recipes.compare.arms import Arm
from curation.recipes.compare.options import parse
from curation.recipes.compare.run import Run
from curation.recipes.compare.workload import Workload, make_workload

__all__ = ["Arm", "Run", "Workload", "make_workload", "parse"]
