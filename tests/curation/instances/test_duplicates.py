"""Near-duplicates against all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.instances import near_duplicates


def twin(x, similarity):
    """The first row stays, and every other one but where any earlier row is as near."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return [any(float(x[i] @ x[j]) >= similarity for i in range(j)) for j in range(len(x))]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**20), st.floats(0.0, 1.0))
def test_small_sets_are_compared_whole(n, seed, repeated):
    """Rows of a few kinds far from one another, each a little off: more of a kind than neighbours in the graph."""
    rng = np.random.default_rng(seed)
    kinds = np.concatenate([np.eye(12), -np.eye(12)])
    x = kinds[rng.integers(0, max(1, int(24 * repeated)), n)] * rng.uniform(0.5, 2, (n, 1))
    x += 1e-3 * rng.standard_normal(x.shape)
    assert near_duplicates(x.astype(np.float32)).tolist() == twin(x, 0.95)


def test_copies_in_a_large_set_are_found():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 32)).astype(np.float32)
    x[2000:] = x[:1000] + 0.01 * rng.standard_normal((1000, 32))
    found = near_duplicates(x)
    assert not found[:2000].any()
    assert found[2000:].mean() > 0.9  # the graph is approximate


def test_many_equal_rows_leave_one():
    assert near_duplicates(np.ones((2000, 3))).sum() == 1999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], 0.0), "`similarity` must be in"),
        (([[1.0]], 1.5), "`similarity` must be in"),
        (([[1.0]], 0.9, -1), "`seed` must be"),
        (([1.0, 2.0],), r"`features` must be \[N, D\], but got \[2\]"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        near_duplicates(*arguments)
