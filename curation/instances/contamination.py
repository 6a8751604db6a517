"""Rows of a pool of text that share a run of words with rows that a model will be tested on."""

import re
from collections.abc import Iterable

import numpy as np

from curation.checks import check_integer

WORD = re.compile(r"\w+")


def contaminated(pool: Iterable[str], tests: Iterable[str], n: int = 13) -> np.ndarray:
    """Whether a text shares ``n`` words in a row with a test (arXiv 2005.14165, appendix C).

    Words are runs of letters, digits and underscores in lower case, so punctuation and spaces do not count; a
    language without spaces has few of them, and needs a smaller ``n``. A test of fewer words is shared with no text.

    Args:
        pool: ``N`` texts.
        tests: The tests.
        n: Words in a row.

    Returns:
        bool ``[N]``.

    Raises:
        ValueError: If no test has ``n`` words, so that nothing would be found.

    Example:
        >>> contaminated(["So, what is two plus two?", "Two plus two."], ["What is two plus two"], n=4).tolist()
        [True, False]
    """
    check_integer("n", n, 1)
    runs = {run for test in tests for run in _runs(test, n)}
    if not runs:
        raise ValueError(f"Argument `tests` must have a text of at least {n} words, but has none.")
    return np.array([not runs.isdisjoint(_runs(text, n)) for text in pool], dtype=bool)


def _runs(text: str, n: int) -> Iterable[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)
