"""Questions with answers that a program can check."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from curation.checks import check_choice, check_integer, check_text
from curation.recipes.rollouts.rewards import final_answer, last_box, number
from curation.recipes.sources import require_extra
from curation.replace import replace_attribute

Kind = Literal["sum", "reverse", "sort"]


class Task(Protocol):
    """Numbered questions, and a score for any answer to them.

    A task may also have ``difficulty(i) -> int``, by which pass@k of the hardest quarter is reported, and
    ``solution(i) -> str``, on which a policy can be warmed up.
    """

    def __len__(self) -> int: ...

    def question(self, i: int) -> str:
        """The text of a question."""
        ...

    def score(self, i: int, answer: str) -> float:
        """The reward of an answer, in [0, 1]."""
        ...


class SomeQuestions:
    """Some questions of a task, numbered anew; what else the task has stays as it is.

    Args:
        task: The task.
        ids: The numbers of the questions in it.

    Example:
        >>> task = SomeQuestions(Puzzles("reverse", 3, seed=1), [2, 0])
        >>> len(task), task.question(0), task.solution(0)
        (2, 'vho=', 'ohv')
    """

    def __init__(self, task: Task, ids: Sequence[int]) -> None:
        self.task, self.ids = task, list(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def question(self, i: int) -> str:
        """The text of a question."""
        return self.task.question(self.ids[i])

    def score(self, i: int, answer: str) -> float:
        """The reward of an answer, in [0, 1]."""
        return self.task.score(self.ids[i], answer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("task", "ids"):  # not set yet, while it is copied
            raise AttributeError(name)
        value = getattr(self.task, name)
        if name in ("solution", "difficulty"):
            return lambda i: value(self.ids[i])
        return value


class Puzzles:
    """Puzzles on a few characters, whose difficulty is their length; made without packages or files.

    Args:
        kind: ``"sum"`` (``"27+5="``, ``"32"``), ``"reverse"`` (``"abc="``, ``"cba"``) or ``"sort"``
            (``"cab="``, ``"abc"``).
        size: Number of questions; they repeat only where there are not as many different ones.
        shortest: Number of digits or letters of the easiest questions.
        longest: Number of digits or letters of the hardest questions. All lengths are equally frequent.
        seed: Seed of the questions.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> task = Puzzles("reverse", 3, shortest=2, longest=4, seed=1)
        >>> [(task.question(i), task.solution(i), task.difficulty(i)) for i in range(3)]
        [('sz=', 'zs', 2), ('dvh=', 'hvd', 3), ('odpf=', 'fpdo', 4)]
    """

    def __init__(
        self,
        kind: Kind = "sum",
        size: int = 300,
        shortest: int = 1,
        longest: int = 3,
        seed: int = 0,
    ) -> None:
        check_choice("kind", kind, get_args(Kind))
        check_integer("size", size, 1)
        check_integer("shortest", shortest, 1)
        check_integer("longest", longest, shortest)
        check_integer("seed", seed, 0)
        generator, questions = random.Random(f"{kind}-{seed}"), set()
        self.items: list[tuple[str, str, int]] = []
        for i in range(size):
            length = shortest + i % (longest - shortest + 1)
            for _ in range(100):  # then a question is repeated
                item = self._make(kind, length, generator)
                if item[0] not in questions:
                    break
            questions.add(item[0])
            self.items.append(item)

    @staticmethod
    def _make(kind: str, length: int, generator: random.Random) -> tuple[str, str, int]:
        """A question, its solution and its difficulty."""
        if kind == "sum":
            a, b = (generator.randrange(10 ** (length - 1) if length > 1 else 0, 10**length) for _ in range(2))
            return f"{a}+{b}=", str(a + b), length
        letters = "".join(generator.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
        return f"{letters}=", letters[::-1] if kind == "reverse" else "".join(sorted(letters)), length

    def __len__(self) -> int:
        return len(self.items)

    def question(self, i: int) -> str:
        """The text of a puzzle, such as ``"27+5="``."""
        return self.items[i][0]

    def solution(self, i: int) -> str:
        """The correct answer."""
        return self.items[i][1]

    def difficulty(self, i: int) -> int:
        """The number of digits or letters."""
        return self.items[i][2]

    def score(self, i: int, answer: str) -> float:
        """1 for the correct answer without further text, else 0."""
        return float(answer.strip() == self.items[i][1])


class ReasoningGym:
    """A task family of reasoning-gym (PyPI), with its own scorer.

    Args:
        name: Name of the family, such as ``"basic_arithmetic"``.
        size: Number of questions.
        seed: Seed of the questions. Question ``i + 1`` of a seed is often question ``i`` of the next seed: for other
            questions, take seeds that differ by more than ``size``.
        options: Options of the family, such as ``{"min_digits": 1}``.
        instruction: Text before each question.

    Raises:
        ImportError: If reasoning-gym is missing.
        ValueError: If there is no such family, or an argument is out of its range.
    """

    def __init__(
        self,
        name: str,
        size: int = 300,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        instruction: str = "Answer with the final answer only. ",
    ) -> None:
        check_text("name", name)
        check_integer("size", size, 1)
        check_integer("seed", seed, 0)
        check_text("instruction", instruction)
        try:
            import reasoning_gym
        except ImportError as error:
            raise ImportError("Task `ReasoningGym` needs `pip install 'lightning-curation[demo]'`.") from error
        try:
            self.data = reasoning_gym.create_dataset(name, size=size, seed=seed, **(options or {}))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"Argument `name` must be a task family, with its `options`, but {error}.") from error
        self.name, self.instruction = name, instruction

    def __len__(self) -> int:
        return len(self.data)

    def question(self, i: int) -> str:
        """The instruction and the question of the family."""
        return self.instruction + self.data[i]["question"]

    def solution(self, i: int) -> str:
        """The answer of the family.

        Raises:
            ValueError: If the family has no answers, but a scorer only (as ``graph_color``).
        """
        answer = self.data[i]["answer"]
        if answer is None:
            raise ValueError(
                f"Argument `name` must be a family with answers to learn from, but {self.name!r} has only a scorer."
            )
        return str(answer)

    def score(self, i: int, answer: str) -> float:
        """1 if the family's own scorer gives the final answer the full score, which is 1; else 0.

        The final answer has as many lines as the family's; where that is not one line, it may be the whole text.
        """
        item = self.data[i]
        lines = (
            1 if item["answer"] is None else max(1, sum(map(bool, map(str.strip, str(item["answer"]).splitlines()))))
        )
        candidates = [final_answer(answer, lines)]
        if lines > 1 or item["answer"] is None:
            candidates.append(answer.strip())
        return float(any(self.data.score_answer(candidate, item) == 1 for candidate in candidates))


class _WorkedProblems:
    """Problems with worked answers, from a file or the hub."""

    items: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.items)

    def question(self, i: int) -> str:
        """The problem."""
        return self.items[i][0]

    def solution(self, i: int) -> str:
        """The worked answer."""
        return self.items[i][1]


class FinalNumber(_WorkedProblems):
    """Word problems whose answer is a number, such as GSM8K.

    Args:
        data: File of JSON lines, or a hub name, with ``question`` and ``answer``; the answer's last number counts.
        split: Split of the data set on the hub.
        limit: Largest number of questions; None for all.

    Raises:
        ValueError: If there are no questions, an answer has no number, or ``limit`` is not a positive integer.
    """

    def __init__(self, data: str, split: str = "train", limit: int | None = None) -> None:
        self.items = _questions(data, split, limit)
        self.numbers = [number(answer) for _, answer in self.items]
        if None in self.numbers:
            raise ValueError(
                f"Argument `data` must have a number in every answer, but row {self.numbers.index(None)} has none."
            )

    def score(self, i: int, answer: str) -> float:
        """1 if the last number of the final answer is the correct one, else 0."""
        return float(number(final_answer(answer)) == self.numbers[i])


class Expression(_WorkedProblems):
    """Problems whose answer is an expression, such as MATH; math-verify decides which answers are equal to it.

    Args:
        data: File of JSON lines, or a hub name, with ``question`` and ``answer``, in LaTeX or plain text.
        split: Split of the data set on the hub.
        limit: Largest number of questions; None for all.

    Raises:
        ImportError: If math-verify is missing.
        ValueError: If there are no questions, an answer has no expression, or ``limit`` is not a positive integer.
    """

    def __init__(self, data: str, split: str = "train", limit: int | None = None) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise ImportError("Expression needs `pip install math-verify`.") from error
        self._library = math_verify
        self.items = _questions(data, split, limit)
        self.expected = [self._parse(answer) for _, answer in self.items]
        if [] in self.expected:
            raise ValueError(
                f"Argument `data` must have an expression in every answer, but row {self.expected.index([])} has "
                "none."
            )

    def _parse(self, text: str) -> list[Any]:
        """The expressions of a text, in which capital and small letters differ; of its boxes the last one counts."""
        parser: Any = sys.modules[self._library.parse.__module__]
        # math-verify 0.9.0 makes all letters small, and has no option for that.
        undo = replace_attribute(parser, "parse_latex_cached", _parse_latex)
        try:
            # Without its own timeouts: they would take the timer of `rewards.score`.
            return self._library.parse(last_box(text), parsing_timeout=None)
        finally:
            undo()

    def score(self, i: int, answer: str) -> float:
        r"""1 if the last ``\boxed{}`` of the answer, or else its expression, is equal to the correct one, else 0."""
        return float(self._library.verify(self.expected[i], self._parse(answer), timeout_seconds=None))


def _parse_latex(latex: str) -> Any:
    """The expression of LaTeX, or of its last equation, in which capital and small letters differ."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify.parser import get_last_eq, should_treat_as_complex

    def convert(text: str) -> Any:
        return latex2sympy(
            text, is_real=not should_treat_as_complex(text), convert_degrees=False, normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )  # fmt: skip

    try:
        return convert(latex)
    except Exception:  # the parser raises anything
        equation = get_last_eq(latex)
        if equation == latex:
            raise
        return convert(equation)


def _questions(data: str, split: str, limit: int | None) -> list[tuple[str, str]]:
    """Questions with their answers, from a file or the hub."""
    check_text("data", data)
    check_text("split", split)
    check_integer("limit", limit, 1, optional=True)
    if Path(data).is_file():
        rows: Any = [json.loads(line) for line in Path(data).read_text().splitlines() if line.strip()]
    else:
        require_extra()
        from datasets import load_dataset

        rows = load_dataset(data, "main" if data == "openai/gsm8k" else None, split=split)
    items = [(row["question"], row["answer"]) for row in rows][:limit]
    if not items:
        raise ValueError(f"Argument `data` must hold questions, but {data!r} has none.")
    return items
