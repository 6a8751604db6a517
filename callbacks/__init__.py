"""Lightning callbacks: when curation happens."""

from curation.callbacks.exact_resume import ExactResume
from curation.callbacks.online_selection import OnlineSelection
from curation.callbacks.uniform import UniformSelection
from curation.callbacks.utility_diversity import UtilityDiversitySelection

__all__ = ["ExactResume", "OnlineSelection", "UniformSelection", "UtilityDiversitySelection"]
