"""Random streams are captured and restored whole."""

import io
import random

import numpy as np
import torch

from curation import rng


def draws():
    return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())


def test_a_restored_state_repeats_every_stream():
    random.gauss(0, 1), np.random.randn()  # leave a cached half of a pair in both
    state = rng.capture()
    first = draws()
    assert draws() != first
    rng.restore(state)
    assert draws() == first


def test_a_state_survives_a_weights_only_checkpoint():
    state = rng.capture()
    first = draws()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    rng.restore(torch.load(file, weights_only=True))
    assert draws() == first


def test_isolation_restores_after_an_exception():
    state = rng.capture()
    expected = draws()
    rng.restore(state)
    try:
        with rng.isolated():
            draws()
            raise KeyError
    except KeyError:
        pass
    assert draws() == expected
