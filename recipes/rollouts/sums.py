"""Sums of two numbers in words, by reasoning-gym, or made here where that package is missing."""

import random
from typing import ClassVar

from curation.checks import check_choice, check_integer
from curation.recipes.rollouts.rewards import final_answer
from curation.recipes.rollouts.tasks import ReasoningGym
from curation.recipes.sources import AUTO, Source, found, installed

SUMS = (
    Source("reasoning_gym", "sums of the package reasoning-gym, with its own scorer", installed("reasoning_gym")),
    Source("made", "sums that are made on the spot"),
)


class Sums:
    """Sums (of reasoning-gym, differences too) of two numbers of one or two digits.

    Args:
        size: Number of questions.
        seed: Seed of the questions. Question ``i + 1`` of a seed is often question ``i`` of the next seed: for other
            questions, take seeds that differ by more than ``size``.
        source: ``"reasoning_gym"`` (``chain_sum`` of that package, with its scorer), ``"made"`` (here), or
            ``"auto"``, the first where the package is installed.

    Raises:
        ImportError: If reasoning-gym is asked for and missing.
        ValueError: If an argument is out of its range.

    Example:
        >>> task = Sums(2, source="made")
        >>> task.question(0), task.solution(0), task.score(0, "103")
        ('Answer with the final answer only. 97 + 5 =', '102', 0.0)
    """

    auto_sources: ClassVar = {"source": SUMS}

    def __init__(self, size: int = 300, seed: int = 0, source: str = AUTO) -> None:
        self.size: int = check_integer("size", size, 1)
        self.seed: int = check_integer("seed", seed, 0)
        source = found(self.auto_sources, {"source": source})["source"]
        check_choice("source", source, ("reasoning_gym", "made"))
        options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
        self.task = ReasoningGym("chain_sum", size, seed, options) if source == "reasoning_gym" else None

    def __len__(self) -> int:
        return self.size

    def _numbers(self, i: int) -> tuple[int, int]:
        draw = random.Random(self.seed + i)
        first, second = (draw.randrange(10 ** draw.randint(1, 2)) for _ in range(2))
        return first, second

    def question(self, i: int) -> str:
        """The text of a sum."""
        if self.task is not None:
            return self.task.question(i)
        return "Answer with the final answer only. {} + {} =".format(*self._numbers(i))

    def solution(self, i: int) -> str:
        """The sum."""
        return str(sum(self._numbers(i))) if self.task is None else self.task.solution(i)

    def score(self, i: int, answer: str) -> float:
        """1 if the final answer is the sum, else 0."""
        if self.task is not None:
            return self.task.score(i, answer)
        return float(final_answer(answer) == self.solution(i))
