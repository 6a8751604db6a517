"""Reinforcement learning with verifiable rewards: policies, tasks and rewards."""

from curation.recipes.rollouts.answers import Rollouts
from curation.recipes.rollouts.language_models import FromScratch, LanguageModelSource, Pretrained, Text
from curation.recipes.rollouts.policy import PolicyModule
from curation.recipes.rollouts.prompts import Prompts
from curation.recipes.rollouts.rewards import final_answer, number, score
from curation.recipes.rollouts.solve_picture import SolvePicture
from curation.recipes.rollouts.sums import Sums
from curation.recipes.rollouts.tasks import Expression, FinalNumber, Puzzles, ReasoningGym, Task

__all__ = [
    "Expression",
    "FinalNumber",
    "FromScratch",
    "LanguageModelSource",
    "PolicyModule",
    "Pretrained",
    "Prompts",
    "Puzzles",
    "ReasoningGym",
    "Rollouts",
    "SolvePicture",
    "Sums",
    "Task",
    "Text",
    "final_answer",
    "number",
    "score",
]
