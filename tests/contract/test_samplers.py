"""What every sampler of the package holds: its length, its order, its part on each rank, and its place after a kill.

That each argument is checked by name is tested for all public classes in ``test_arguments.py``.
"""

import copy
import inspect
import io
from collections.abc import Callable
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch.utils.data import Sampler

from curation import samplers
from curation.samplers import (
    ConceptAwareSampler,
    ConceptIndex,
    DynamicDataPruningSampler,
    GlobalBatchSampler,
    HardBatchSampler,
    LengthGroupedSampler,
    NarrowingSampler,
    PromptSampler,
    SubsetSampler,
    TokenBudgetSampler,
)

N, SIZE = 36, 3  # samples, and rows of a batch of a process: epochs of 1, 2 and 3 processes are whole batches
CONCEPTS = ConceptIndex.from_lists([["a"], ["b"], ["a", "b"]] * (N // 3))
LENGTHS = [2 + i * 7 % 5 for i in range(N)]
MAKE: dict[str, Callable[..., Any]] = {
    "ConceptAwareSampler": lambda seed: ConceptAwareSampler(CONCEPTS, SIZE, 2 * SIZE, visit_penalty=0.1, seed=seed),
    "DynamicDataPruningSampler": lambda seed: DynamicDataPruningSampler(range(N), SIZE, seed=seed),
    "HardBatchSampler": lambda seed: HardBatchSampler(range(N), SIZE, seed=seed),
    "LengthGroupedSampler": lambda seed: LengthGroupedSampler(LENGTHS, SIZE, window=2, seed=seed),
    "NarrowingSampler": lambda seed: NarrowingSampler(range(N)[::-1], SIZE, steps=5, first=1.0, seed=seed),
    "PromptSampler": lambda seed: PromptSampler(range(N), SIZE, seed=seed),
    "SubsetSampler": lambda seed: SubsetSampler(range(N), range(0, N, 2), seed=seed),
    "TokenBudgetSampler": lambda seed: TokenBudgetSampler(LENGTHS, max_tokens=12, window=2, seed=seed),
}
every_sampler = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def test_every_public_sampler_is_here():
    public = {
        name for name in samplers.__all__ if inspect.isclass(c := getattr(samplers, name)) and issubclass(c, Sampler)
    }
    assert public - {GlobalBatchSampler.__name__} == MAKE.keys()


def batches(sampler: Any, epoch: int):
    """The batches of an epoch, or what is left of it, each trained on as soon as the next one is asked for."""
    sampler.set_epoch(epoch)
    rows = iter(sampler)
    for batch in rows if isinstance(sampler, TokenBudgetSampler) else iter(lambda: list(islice(rows, SIZE)), []):
        yield batch
        if isinstance(sampler, DynamicDataPruningSampler):
            sampler.trained((sampler.next.ids * 5 % 8 / 7).float())
        elif isinstance(sampler, HardBatchSampler):
            sampler.trained(sampler._indices(sampler._drawn[0]).float().std())
    if hasattr(sampler, "end_epoch"):
        sampler.end_epoch()


def epochs(sampler: Any, number: int = 3) -> list[list[list[int]]]:
    return [list(batches(sampler, epoch)) for epoch in range(number)]


@pytest.fixture
def on(monkeypatch):
    """Look at the samplers from a rank of some processes."""

    def place(rank: int, processes: int) -> None:
        monkeypatch.setattr(GlobalBatchSampler, "_place", property(lambda _: (rank, processes)))

    return place


@every_sampler
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_is_as_long_as_is_said(make, processes, on):
    on(processes - 1, processes)
    sampler = make(0)
    for epoch in epochs(sampler):
        rows = len(epoch) if isinstance(sampler, TokenBudgetSampler) else sum(map(len, epoch))
        assert rows == len(sampler) > 0


@every_sampler
def test_the_order_depends_on_the_seed_and_is_shuffled(make):
    assert epochs(make(1)) == epochs(make(1))
    assert epochs(make(1)) != epochs(make(2))
    assert len({str(epoch) for epoch in epochs(make(1))}) > 1


@every_sampler
@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_take_as_many_rows_of_a_step_and_none_that_another_takes(make, processes, on):
    of_ranks = []
    for rank in range(processes):
        on(rank, processes)
        of_ranks.append(list(batches(make(0), 0)))
    assert len({tuple(map(len, epoch)) for epoch in of_ranks}) == 1
    for parts in zip(*of_ranks, strict=True):
        rows = list(chain.from_iterable(parts))
        assert len(set(rows)) == len(rows)
        assert 0 <= min(rows) <= max(rows) < N


@every_sampler
@pytest.mark.parametrize("done", [0, 2])
def test_a_killed_epoch_goes_on_where_it_was(make, done):
    """By the state where a sampler has one, else by skipping, since the order is that of seed and epoch."""
    sampler, again = make(3), make(3)
    list(batches(sampler, 0))
    interrupted = batches(sampler, 1)
    before = list(islice(interrupted, done + 1))[:done]  # the last one is drawn, and not trained on
    if hasattr(sampler, "load_state_dict"):
        file = io.BytesIO()
        state = sampler.state_dict(done) if isinstance(sampler, ConceptAwareSampler) else sampler.state_dict()
        torch.save(copy.deepcopy(state), file)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=False))
        rest = list(batches(again, 1))
    else:
        rest = list(batches(again, 1))[done:]
    expected = epochs(make(3))
    assert before + rest == expected[1]
    assert list(batches(again, 2)) == expected[2]
