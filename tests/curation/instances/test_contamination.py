"""Words in a row that are shared with tests, against a comparison of every run with every run."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.instances import contaminated

TEXTS = st.lists(st.text("ab Ä,.\n_1", max_size=40), min_size=1, max_size=8)


def twin(pool, tests, n):
    def words(text):
        return [word.lower() for word in re.split(r"[^\w]+", text) if word]

    def shared(text):
        for test in tests:
            for i in range(len(words(text)) - n + 1):
                for j in range(len(words(test)) - n + 1):
                    if words(text)[i : i + n] == words(test)[j : j + n]:
                        return True
        return False

    return [shared(text) for text in pool]


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_it_is_that_of_every_run(pool, tests, n):
    if all(len(re.findall(r"\w+", test)) < n for test in tests):
        with pytest.raises(ValueError, match=f"`tests` must have a text of at least {n} words"):
            contaminated(pool, tests, n)
    else:
        assert contaminated(iter(pool), iter(tests), n).tolist() == twin(pool, tests, n)


def test_thirteen_words_count_and_twelve_do_not():
    words = [f"w{i}" for i in range(20)]
    pool = [" ".join(words[3:16]), " ".join(words[3:15]), "And: " + ", ".join(words[:13]).upper() + "!"]
    assert contaminated(pool, [" ".join(words)]).tolist() == [True, False, True]


@pytest.mark.parametrize("n", [0, 1.5])
def test_a_number_of_words_that_is_none(n):
    with pytest.raises(ValueError, match="`n` must be an integer >= 1"):
        contaminated(["a"], ["a"], n)
