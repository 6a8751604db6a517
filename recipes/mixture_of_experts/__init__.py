"""A mixture of experts on text of several domains."""

from curation.recipes.mixture_of_experts.domains import Domains, DomainSampler, Pieces
from curation.recipes.mixture_of_experts.expert_picture import ExpertPicture
from curation.recipes.mixture_of_experts.mixture_lm import MixtureLM

__all__ = [
    "DomainSampler",
    "Domains",
    "ExpertPicture",
    "MixtureLM",
    "Pieces",
]
