"""The reward of an answer: its final part, the number in it, and its score under a time limit."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from curation.checks import check_number


class Scorer(Protocol):
    """What rewards answers; every :class:`~curation.recipes.rollouts.Task` does."""

    def score(self, i: int, answer: str) -> float:
        """The reward of an answer to question ``i``, in [0, 1]."""
        ...


def final_answer(text: str) -> str:
    r"""The final answer of a text: after ``####``, in ``\boxed{}``, after "answer is", or else the last line.

    Example:
        >>> [final_answer(t) for t in ("So\n#### 7", "It is $\\boxed{7}$.", "The answer is: 7.", "no\n7")]
        ['7', '7', '7', '7']
    """
    for pattern in (r"####\s*(.+)", r"\\boxed\{([^{}]*)\}", r"(?i)answer\s*(?:is|:)\s*:?\s*(.+)"):
        matches = re.findall(pattern, text)
        if matches:
            return matches[-1].strip().rstrip(".")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def number(text: str) -> float | None:
    """The last number in a text; None where there is none.

    Example:
        >>> number("1,200 of 3 are $-4.50"), number("none")
        (-4.5, None)
    """
    matches = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.replace("$", ""))
    return float(matches[-1].replace(",", "")) if matches else None


def score(task: Scorer, i: int, answer: str, seconds: float = 5.0) -> tuple[float, str | None]:
    """The reward of an answer, and the error if it could not be scored; then the reward is 0, and the run goes on.

    An error is an exception of the task, a timeout, or a reward out of [0, 1].

    Args:
        task: The task that scores the answer.
        i: The number of the question.
        answer: The answer to it.
        seconds: Time limit in seconds. It holds on the main thread only, and on systems with timers (not Windows).

    Raises:
        ValueError: If ``seconds`` is not positive.

    Example:
        >>> from curation.recipes.rollouts import Puzzles
        >>> score(Puzzles("sum", 1, seed=3), 0, "no idea")
        (0.0, None)
    """
    check_number("seconds", seconds, "(0, inf)")
    try:
        with _time_limit(seconds):
            reward = float(task.score(i, answer))
    except Exception as error:  # a user's task may raise anything
        return 0.0, repr(error)
    if not 0 <= reward <= 1:
        return 0.0, f"a reward must be in [0, 1], but is {reward}"
    return reward, None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in the block after some seconds, by the timer of the process."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no score after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
