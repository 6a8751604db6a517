"""Questions with answers that a program can check."""

import json
import random
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from curation.recipes.sources import require_extra


class Task(Protocol):
    """Numbered questions, and a score for any answer to them.

    One that also has ``difficulty(i) -> int`` is reported by it, and one with ``solution(i) -> str`` can be warmed up
    on by supervised fine-tuning.
    """

    def __len__(self) -> int: ...

    def question(self, i: int) -> str:
        """The text of a question."""
        ...

    def score(self, i: int, answer: str) -> float:
        """The reward of an answer, in [0, 1]."""
        ...


class Puzzles:
    """Small puzzles on characters, as hard as they are long; nothing needs to be installed or read.

    Args:
        kind: ``"sum"`` (``"27+5="``, ``"32"``), ``"reverse"`` (``"abc="``, ``"cba"``) or ``"sort"``
            (``"cab="``, ``"abc"``).
        size: Number of questions, all different while there are as many.
        shortest: Digits or letters of the easiest; the difficulty is the length.
        longest: Of the hardest. Lengths are equally frequent.
        seed: Of the questions.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> task = Puzzles("reverse", 3, shortest=2, longest=4, seed=1)
        >>> [(task.question(i), task.solution(i), task.difficulty(i)) for i in range(3)]
        [('sz=', 'zs', 2), ('dvh=', 'hvd', 3), ('odpf=', 'fpdo', 4)]
    """

    def __init__(
        self,
        kind: Literal["sum", "reverse", "sort"] = "sum",
        size: int = 300,
        shortest: int = 1,
        longest: int = 3,
        seed: int = 0,
    ) -> None:
        if kind not in ("sum", "reverse", "sort"):
            raise ValueError(f"Argument `kind` must be 'sum', 'reverse' or 'sort', but got {kind!r}.")
        if size < 1:
            raise ValueError(f"Argument `size` must be >= 1, but got {size!r}.")
        if not 1 <= shortest <= longest:
            raise ValueError(f"Argument `shortest` must be in [1, longest = {longest}], but got {shortest!r}.")
        draw, seen = random.Random(f"{kind}-{seed}"), set()
        self.items: list[tuple[str, str, int]] = []
        for i in range(size):
            length = shortest + i % (longest - shortest + 1)
            for _ in range(100):  # then twice the same
                item = self._make(kind, length, draw)
                if item[0] not in seen:
                    break
            seen.add(item[0])
            self.items.append(item)

    @staticmethod
    def _make(kind: str, length: int, draw: random.Random) -> tuple[str, str, int]:
        if kind == "sum":
            a, b = (draw.randrange(10 ** (length - 1) if length > 1 else 0, 10**length) for _ in range(2))
            return f"{a}+{b}=", str(a + b), length
        letters = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
        return f"{letters}=", letters[::-1] if kind == "reverse" else "".join(sorted(letters)), length

    def __len__(self) -> int:
        return len(self.items)

    def question(self, i: int) -> str:
        """Such as ``"27+5="``."""
        return self.items[i][0]

    def solution(self, i: int) -> str:
        """The answer."""
        return self.items[i][1]

    def difficulty(self, i: int) -> int:
        """The length."""
        return self.items[i][2]

    def score(self, i: int, answer: str) -> float:
        """1 for the answer and nothing else."""
        return float(answer.strip() == self.items[i][1])


class ReasoningGym:
    """A task family of reasoning-gym (PyPI), with its own scorer.

    Args:
        name: Such as ``"basic_arithmetic"``.
        size: Number of questions.
        seed: Of the questions.
        options: Of the family, such as ``{"min_digits": 1}``.
        instruction: Put before each question.

    Raises:
        ImportError: If reasoning-gym is missing.
        ValueError: If there is no such family.
    """

    def __init__(
        self,
        name: str,
        size: int = 300,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        instruction: str = "Answer with the final answer only. ",
    ) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ImportError("Task `ReasoningGym` needs `pip install 'lightning-curation[demo]'`.") from error
        try:
            self.data = reasoning_gym.create_dataset(name, size=size, seed=seed, **(options or {}))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"Argument `name` must be a task family, with its `options`, but {error}.") from error
        self.instruction = instruction

    def __len__(self) -> int:
        return len(self.data)

    def question(self, i: int) -> str:
        """The text of the family."""
        return self.instruction + self.data[i]["question"]

    def solution(self, i: int) -> str:
        """The answer of the family."""
        return str(self.data[i]["answer"])

    def score(self, i: int, answer: str) -> float:
        """1 if the family's own scorer finds the final answer right."""
        return float(self.data.score_answer(final_answer(answer), self.data[i]) >= 0.99)


class FinalNumber:
    """Word problems whose answer is a number, such as GSM8K.

    Args:
        data: File of JSON lines, or a hub name, with ``question`` and ``answer``; the answer's last number counts.
        split: Of the hub.
        limit: Questions at most.

    Raises:
        ValueError: If there is nothing, or a question has no number for an answer.
    """

    def __init__(self, data: str, split: str = "train", limit: int | None = None) -> None:
        self.items = _questions(data, split, limit)
        self.numbers = [number(answer) for _, answer in self.items]
        if None in self.numbers:
            raise ValueError(
                f"Argument `data` must have a number in every answer, but row {self.numbers.index(None)} has none."
            )

    def __len__(self) -> int:
        return len(self.items)

    def question(self, i: int) -> str:
        """The problem."""
        return self.items[i][0]

    def solution(self, i: int) -> str:
        """The worked answer."""
        return self.items[i][1]

    def score(self, i: int, answer: str) -> float:
        """1 if the last number is the right one."""
        return float(number(final_answer(answer)) == self.numbers[i])


class Expression:
    """Problems whose answer is an expression, such as MATH: right is what math-verify finds equal to it.

    Args:
        data: File of JSON lines, or a hub name, with ``question`` and ``answer``, in LaTeX or plain.
        split: Of the hub.
        limit: Questions at most.

    Raises:
        ImportError: If math-verify is missing.
        ValueError: If there is nothing, or an answer is no expression.
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
        # Without its own timeouts, which take the timer that scores run under.
        return self._library.parse(text, parsing_timeout=None)

    def __len__(self) -> int:
        return len(self.items)

    def question(self, i: int) -> str:
        """The problem."""
        return self.items[i][0]

    def solution(self, i: int) -> str:
        """The worked answer."""
        return self.items[i][1]

    def score(self, i: int, answer: str) -> float:
        """1 if the answer is equal, however it is written."""
        return float(self._library.verify(self.expected[i], self._parse(answer), timeout_seconds=None))


def _questions(data: str, split: str, limit: int | None) -> list[tuple[str, str]]:
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


def final_answer(text: str) -> str:
    r"""What a text ends on: after ``####``, in ``\boxed{}``, after "answer is", or else the last line.

    Example:
        >>> [final_answer(t) for t in ("So\n#### 7", "It is $\\boxed{7}$.", "The answer is: 7.", "no\n7")]
        ['7', '7', '7', '7']
    """
    for pattern in (r"####\s*(.+)", r"\\boxed\{([^{}]*)\}", r"(?i)answer\s*(?:is|:)\s*:?\s*(.+)"):
        found = re.findall(pattern, text)
        if found:
            return found[-1].strip().rstrip(".")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def number(text: str) -> float | None:
    """The last number in a text; None where there is none.

    Example:
        >>> number("1,200 of 3 are $-4.50"), number("none")
        (-4.5, None)
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.replace("$", ""))
    return float(found[-1].replace(",", "")) if found else None


def score(task: Task, i: int, answer: str, seconds: float = 5.0) -> tuple[float, str | None]:
    """The reward of an answer, and what went wrong: an exception, more than some seconds, or a reward out of range.

    Then the reward is 0, since one answer must not end a run.

    Args:
        task: Scores it.
        i: The question.
        answer: To it.
        seconds: After which it counts as wrong; only on the main thread, and where the system has timers.
    """
    try:
        with _at_most(seconds):
            reward = float(task.score(i, answer))
    except Exception as error:  # whatever a task of the user's own raises
        return 0.0, repr(error)
    if not 0 <= reward <= 1:
        return 0.0, f"a reward must be in [0, 1], but is {reward}"
    return reward, None


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no score after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
