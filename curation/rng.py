"""The global random streams of this process: captured, restored, isolated."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, the current CUDA device's included.

    Holds tensors, numbers, strings and lists only, so that a checkpoint of it loads with ``weights_only=True``.
    """
    version, keys, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global stream is the point
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(keys), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Set the global generators to a state from :func:`capture`."""
    torch.set_rng_state(state["torch"].cpu())
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy = state["numpy"]
    key = numpy["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed(*key: int) -> None:
    """Set the global generators that :func:`capture` saves to streams that depend on ``key`` only.

    Args:
        key: Integers >= 0; different keys give independent streams.

    Example:
        >>> seed(7, 1)
        >>> first = torch.rand(2)
        >>> seed(7, 1)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    words = np.random.SeedSequence(key).generate_state(4, np.uint64).tolist()
    random.seed(words[0])
    np.random.seed([word & 0xFFFFFFFF for word in words[1:3]])  # noqa: NPY002 - the global stream is the point
    torch.default_generator.manual_seed(words[3])  # `torch.manual_seed` formats a stack trace for CUDA's sake
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(words[3])


@contextmanager
def isolated() -> Iterator[None]:
    """Restore the state of every global generator when the block ends.

    Example:
        >>> before = torch.get_rng_state()
        >>> with isolated():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    state = capture()
    try:
        yield
    finally:
        restore(state)
