"""Rounds of prompts: rules against slow twins, a simulated bandit, and the state of the sampler."""

import io
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import PromptMemoryTwin, slow_prompts

from curation.records import PromptMemory
from curation.samplers import PromptSampler
from curation.samplers.prompt_rules import PROMPT_RULES, thompson


@given(
    st.sampled_from(list(PROMPT_RULES)),
    st.lists(st.lists(st.integers(0, 8), max_size=4), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 9),
)
def test_a_round_equals_the_slow_twin(rule, groups, prune, decay, seed):
    memory, twin = PromptMemory(len(groups), decay=decay), PromptMemoryTwin(len(groups), 8, decay)
    memory.explore = torch.tensor([0.25, 0.75])
    for i, of_prompt in enumerate(groups):
        for wrong in of_prompt:
            memory.update(torch.tensor([i]), torch.tensor([wrong / 8]), 8, 0)
            twin.groups[i].append(wrong / 8)
    must = [not of_prompt or (i + seed) % 7 == 0 for i, of_prompt in enumerate(groups)]
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    got = PROMPT_RULES[rule](memory, generators[0], must=torch.tensor(must), progress=0.5, prune=prune).tolist()
    assert len(set(got)) == len(got) > 0
    assert sorted(got) == sorted(slow_prompts(rule, twin, [0.25, 0.75], generators[1], must, prune))
    assert {i for i in range(len(groups)) if must[i]} <= set(got)


def test_the_target_of_a_curriculum_moves():
    memory, rate = PromptMemory(100, decay=1.0), torch.linspace(0, 1, 100)
    memory.update(torch.arange(100), 1 - rate, 1000, 0)
    means = []
    for progress in (0.0, 0.5, 1.0):
        ids = thompson(
            memory, torch.Generator(), must=torch.zeros(100, dtype=torch.bool), progress=progress, prune=0.9,
            target=0.8, last_target=0.2,
        )  # fmt: skip
        means.append(float(rate[ids].mean()))
    assert means == pytest.approx([0.8, 0.5, 0.2], abs=0.05)


RATES = torch.cat([torch.ones(4000), torch.zeros(2000), torch.full((4000,), 0.5)])  # of a bandit of 10,000 prompts


def play(sampler, steps):
    """The prompts of every step of the bandit, 500 each, with 8 answers."""
    answers, order, batches = torch.Generator().manual_seed(0), iter(sampler), []
    for step in range(steps):
        for _ in range(500):
            next(order)
        batches.append(sampler.next.ids)
        rights = torch.binomial(torch.full((500,), 8.0), RATES[batches[-1]], generator=answers)
        sampler.trained(1 - rights / 8)
        if (step + 1) % sampler.steps == 0:
            sampler.end_epoch()
            order = iter(sampler)
    return torch.stack(batches)


@pytest.mark.parametrize(("rule", "prune", "silent"), [("streaks", 0.95, 0.0), ("drop_solved", 0.8, 0.25)])
def test_the_share_that_is_tested_again_is_that_which_was_asked_for(rule, prune, silent):
    """In the stationary state, against four standard errors of 500 steps."""
    visits = torch.bincount(
        play(PromptSampler(range(10000), 500, rule=rule, prune=prune, silent=silent), 900)[400:].flatten(),
        minlength=10000,
    )
    solved, failed, between = (float(part.float().mean()) for part in visits.split([4000, 2000, 4000]))
    rounds = between  # a prompt of accuracy 1/2 is visited in every one
    bound = 4 * math.sqrt(prune * (1 - prune) / rounds / 2000) + 0.005  # and some have had two groups alike
    assert solved / rounds == pytest.approx(1 - prune, abs=bound)
    assert failed / rounds == pytest.approx(1 - prune if rule == "streaks" else 1, abs=bound)


def test_streaks_keep_the_share_of_silent_groups_that_was_asked_for():
    """A third of 25 % are all right, by far more than the 1 % of prompts that are visited in any case."""
    batches = play(PromptSampler(range(10000), 500, rule="streaks", silent=0.25), 900)[400:]
    assert float((batches < 4000).float().mean()) == pytest.approx(0.25 / 3, abs=0.01)


def train(sampler, steps, trace, table):
    order = iter(sampler)
    for step in range(steps):
        batch = [next(order) for _ in range(sampler.batch_size)]
        trace.append(batch)
        sampler.trained(table[len(trace) - 1][batch])
        if (step + 1) % sampler.steps == 0:
            sampler.end_epoch()
            order = iter(sampler)


def make(rule, **kwargs):
    return PromptSampler(range(20), 4, rule=rule, seed=3, max_age=3, **kwargs)


def outcomes(batches):
    return torch.randint(0, 4, (batches, 20), generator=torch.Generator().manual_seed(0)) / 3


def from_checkpoint(sampler):
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_run_goes_on_with_another_number_of_processes(monkeypatch):
    first = make("streaks")
    train(first, 5, [], outcomes(5))
    state, expected = from_checkpoint(first), []
    train(first, 8, expected, outcomes(8))
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(PromptSampler, "_place", property(lambda _, rank=rank: (rank, 2)))
        sampler, part = PromptSampler(range(20), 2, rule="streaks", seed=3, max_age=3), []
        sampler.load_state_dict(state)
        for step in range(8):
            if step in (0, 5):
                order = iter(sampler)
            part.append([next(order) for _ in range(2)])
            sampler.trained(outcomes(8)[step][sampler.next.ids])
            if step == 4:
                sampler.end_epoch()
        parts.append(part)
    assert [[a, c, b, d] for (a, b), (c, d) in zip(*parts, strict=True)] == expected


@pytest.mark.parametrize("rule", list(PROMPT_RULES))
def test_a_run_resumes_exactly_at_any_step(rule):
    table, whole = outcomes(25), []
    reference = make(rule)
    train(reference, 25, whole, table)
    for cut in range(25):
        first, second, trace = make(rule), make(rule), []
        train(first, cut, trace, table)
        second.load_state_dict(from_checkpoint(first))
        in_epoch = min(25 - cut, second.steps - second._in_epoch)
        train(second, in_epoch, trace, table)
        second.end_epoch()
        train(second, 25 - cut - in_epoch, trace, table)
        assert trace == whole
        states = reference.memory.state_dict(), second.memory.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_memory_from_a_file_plans_the_first_round(tmp_path):
    memory = PromptMemory(20)
    for step in range(2):
        memory.update(torch.arange(15), torch.tensor([0.0] * 10 + [0.5] * 5), 8, step)
    memory.save(tmp_path / "memory.parquet")
    sampler = make("drop_solved", prune=0.9, start=tmp_path / "memory.parquet")
    order = iter(sampler)
    first = [next(order) for _ in range(8)]
    assert set(range(10, 20)) > set(first) - set(range(10))
    assert sampler.round == 0
    assert sampler.statistics["visited_fraction"] == 11 / 20  # and one solved prompt again
    assert sampler.statistics["solved_fraction"] == 0.5


class Named(list):
    fingerprint = "abc"


def test_a_memory_of_other_prompts_does_not_begin_a_fit(tmp_path):
    PromptMemory(4).save(tmp_path / "memory.parquet", "abc")
    PromptSampler(Named(range(4)), 2, start=tmp_path / "memory.parquet")
    PromptMemory(4).save(tmp_path / "memory.parquet", "def")
    with pytest.raises(ValueError, match=r"Argument `start` .* it has 4 of 'def', and here are 4 of 'abc'"):
        PromptSampler(Named(range(4)), 2, start=tmp_path / "memory.parquet")


def test_a_rule_of_ones_own_is_checked():
    sampler = make(lambda memory, generator, must, progress: torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="must give distinct ids of 0 to 19"):
        sampler.plan(sampler.losses)
    sampler = make(partial(thompson, target=0.9), prune=0.75)
    assert len(sampler.plan(torch.zeros(20))[0]) == 5
