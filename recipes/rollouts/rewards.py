"""The reward of an answer: its final part, the number in it, and its score under a time limit."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from curation.checks import check_integer, check_number

ROUNDING = 1e-6  # a reward this far out of [0, 1] is taken for 0 or 1
REPEAT = 0.1  # seconds between two interruptions of a scorer that goes on after its time limit


class Scorer(Protocol):
    """What rewards answers; every :class:`~curation.recipes.rollouts.Task` does."""

    def score(self, i: int, answer: str) -> float:
        """The reward of an answer to question ``i``, in [0, 1]."""
        ...


def final_answer(text: str, lines: int = 1) -> str:
    r"""The final answer of a text: after ``####``, in ``\boxed{}``, after "answer is", or else the last lines.

    Args:
        text: The text.
        lines: Number of lines of the final answer; empty lines do not count.

    Raises:
        ValueError: If ``lines`` is not a positive integer.

    Example:
        >>> [final_answer(t) for t in ("So\n#### 7", "It is $\\boxed{7}$.", "The answer is: 7.", "no\n7")]
        ['7', '7', '7', '7']
        >>> final_answer("A matrix:\n1 2\n3 4", lines=2)
        '1 2\n3 4'
    """
    check_integer("lines", lines, 1)
    more = rf"(?:\n+[^\n]+){{0,{lines - 1}}}" if lines > 1 else ""
    patterns = (rf"####\s*(.+{more})", r"\\boxed\{([^{}]*)\}", rf"(?i)answer\s*(?:is|:)\s*:?\s*(.+{more})")
    for pattern in patterns:
        matches = re.findall(pattern, text)
        if matches:
            return matches[-1].strip().rstrip(".")
    rows = text.splitlines()
    filled = [i for i, row in enumerate(rows) if row.strip()][-lines:]
    return "\n".join(rows[filled[0] : filled[-1] + 1]).strip() if filled else ""


def last_box(text: str) -> str:
    r"""The last ``\boxed{...}`` of a text, with its braces; the text itself where there is none.

    Example:
        >>> last_box(r"\boxed{3}. Wait: \boxed{\frac{1}{4}}!")
        '\\boxed{\\frac{1}{4}}'
    """
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return text
    depth = 0
    for i in range(text.index("{", start), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start : i + 1]
    return text[start:]


def number(text: str) -> float | None:
    """The last number in a text; None where there is none.

    Example:
        >>> number("1,200 of 3 are $-4.50"), number("none")
        (-4.5, None)
    """
    matches = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.replace("$", ""))
    return float(matches[-1].replace(",", "")) if matches else None


class _TimeLimitExceeded(BaseException):
    """Raised in a scorer; no :class:`Exception`, so that ``except Exception`` does not catch it."""


def score(task: Scorer, i: int, answer: str, seconds: float = 5.0) -> tuple[float, str | None]:
    """The reward of an answer, and the error if it could not be scored; then the reward is 0, and the run goes on.

    An error is anything that the task raises but a ``KeyboardInterrupt``, a timeout, or a reward out of [0, 1] by
    more than rounding (1e-6). A reward may be an array or a tensor of one element.

    Args:
        task: The task that scores the answer.
        i: The number of the question.
        answer: The answer to it.
        seconds: Time limit in seconds. It holds on the main thread only, and on systems with timers (not Windows).
            A scorer that catches even ``BaseException`` is interrupted again every tenth of a second; one that does
            so for ever, or is in a call of C code, is not stopped.

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
            value: Any = task.score(i, answer)
            reward = float(value.item() if hasattr(value, "item") else value)
    except KeyboardInterrupt:
        raise
    except _TimeLimitExceeded:
        return 0.0, repr(TimeoutError(f"no score after {seconds} s"))
    except BaseException as error:  # a user's task may raise anything, `SystemExit` too
        return 0.0, repr(error)
    if not -ROUNDING <= reward <= 1 + ROUNDING:
        return 0.0, f"a reward must be in [0, 1], but is {reward}"
    return min(max(reward, 0.0), 1.0), None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise in the block after some seconds, by the timer of the process, and after it if the block went on."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    exceeded = False

    def stop(*_: Any) -> None:
        nonlocal exceeded
        exceeded = True
        raise _TimeLimitExceeded

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if exceeded:  # whatever the block made of it
            raise _TimeLimitExceeded
