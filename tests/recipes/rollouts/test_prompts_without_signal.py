"""Prompts that teach nothing: left out by a memory, replaced, or updated on in part."""

import multiprocessing
import os
import signal
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from helpers import assert_same_weights, weights
from lightning.pytorch import Callback
from policies import Canned, HalfSolved, Letters, fit, policy, remembered

from curation.callbacks import DifficultyAdaptiveRollouts, DynamicDataPruning
from curation.recipes.rollouts.language_models import FromScratch
from curation.recipes.rollouts.prompts import Prompts
from curation.records import PromptMemory
from curation.samplers import DynamicDataPruningSampler


class Solved(Letters):
    def score(self, i, answer):
        return 1.0


def test_where_nothing_teaches_nothing_is_changed():
    module = policy()
    run = fit(module, data=Prompts(Solved(), batch_size=6), max_epochs=1)
    fresh, _ = FromScratch("abc=", hidden=16, layers=1, heads=2, context=16).build()
    assert_same_weights(weights(module.model), weights(fresh))
    assert run.global_step == 2
    assert float(run.callback_metrics["rollouts/reward"]) == 1


class Answered(Callback):
    def __init__(self):
        self.ids, self.losses = [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids += batch["ids"].tolist()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rollouts = pl_module._last[1]
        for row, i in enumerate(batch["ids"].tolist()):
            self.losses[i] = 1 - float(rollouts.rewards[rollouts.prompt_index == row].mean())


def test_prompts_without_signal_are_left_out_before_anything_is_generated():
    sampler = partial(DynamicDataPruningSampler, rule="signal", prune=0.99, anneal=1.0)
    pruning, answered = DynamicDataPruning(), Answered()
    fit(policy(), answered, pruning, data=Prompts(HalfSolved(), batch_size=4, sampler=sampler), max_epochs=6)
    for i, loss in answered.losses.items():
        assert float(pruning.sampler.losses[i]) == pytest.approx(loss)
    assert sorted(answered.ids[:12]) == list(range(12))  # the first round visits every prompt
    later = answered.ids[24:]
    assert sum(i % 2 == 0 or i == 1 for i in later) < 0.5 * len(later)
    assert set(later) >= {3, 5, 7, 9, 11} - {i for i, loss in answered.losses.items() if loss in (0, 1)}


def test_every_outcome_is_remembered_and_logged(tmp_path):
    answered, pruning = Answered(), DynamicDataPruning(memory=tmp_path / "memory.parquet")
    data = remembered(rule="drop_solved", prune=0.99, decay=0.0)
    run = fit(policy(), answered, pruning, data=data, max_epochs=6)
    memory = pruning.sampler.memory
    for i, loss in answered.losses.items():
        assert float(memory.rate[i]) == pytest.approx(1 - loss)
    steps = [set(step) for step in zip(*[iter(answered.ids)] * 4, strict=True)]  # twice in a step counts once
    assert memory.visits.tolist() == [sum(i in step for step in steps) for i in range(12)]
    assert set(answered.ids[24:]) >= {1, 3, 5}  # what is never solved stays, what is always solved hardly
    assert sum(i % 2 == 0 for i in answered.ids[32:]) < 0.4 * len(answered.ids[32:])
    assert 0 < float(run.callback_metrics["curation/solved_fraction"]) < 1
    table = pq.read_table(tmp_path / "memory.parquet")
    assert table["visits"].to_pylist() == memory.visits.tolist()
    again = DynamicDataPruning()
    fit(policy(), again, data=remembered(rule="drop_solved", start=tmp_path / "memory.parquet"), max_epochs=1)
    assert again.sampler.memory.visits.sum() == memory.visits.sum() + 12


class KillsIn(HalfSolved):
    """Kills the process while answers are scored, in the fourth step."""

    def __init__(self):
        super().__init__()
        self.scored = 0

    def score(self, i, answer):
        self.scored += 1
        if self.scored == 3 * 4 * 6 + 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(i, answer)


def killed(path):
    data = remembered()
    data.task = KillsIn()
    fit(policy(), DynamicDataPruning(memory=path), data=data, limit_val_batches=0)


def test_a_kill_while_answers_are_made_loses_no_outcome_of_a_step_that_ended(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "memory.parquet",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    memory = PromptMemory(12)
    memory.read(tmp_path / "memory.parquet")
    assert (int(memory.visits.sum()), int(memory.last.max())) == (3 * 4, 2)


def test_pass_rates_are_logged_as_a_histogram(monkeypatch):
    drawn, module = [], "curation.callbacks.samplers.dynamic_data_pruning"
    monkeypatch.setattr(f"{module}.takes_histograms", lambda trainer: True)
    monkeypatch.setattr(f"{module}.log_histogram", lambda trainer, name, values: drawn.append((name, values)))
    pruning = DynamicDataPruning()
    fit(policy(), pruning, data=remembered(), max_epochs=2, log_every_n_steps=1)
    assert [name for name, _ in drawn] == ["curation/pass_rate"] * 6
    assert [len(values) for _, values in drawn[:3]] == [4, 8, 12]  # of what was answered
    assert drawn[-1][1] == pruning.sampler.memory.rate.tolist()


def test_a_memory_and_more_rollouts_for_hard_prompts_work_together():
    pruning, adaptive = DynamicDataPruning(), DifficultyAdaptiveRollouts(n=4, budget=6, preflight=0)
    run = fit(policy(), pruning, adaptive, data=remembered(rule="drop_solved"), max_epochs=3)
    assert float(run.callback_metrics["rollouts/per_prompt"]) > 4
    memory = pruning.sampler.memory
    assert memory.solved[::2].min() > 0  # what is always right
    assert float(memory.rate[1]) == 0  # and never


def test_a_memory_needs_a_sampler_that_has_one(tmp_path):
    sampler = partial(DynamicDataPruningSampler, rule="signal")
    with pytest.raises(ValueError, match=r"Argument `memory` needs a PromptSampler, but got .*x' and a DynamicData"):
        fit(
            policy(),
            DynamicDataPruning(memory=tmp_path / "x"),
            data=Prompts(HalfSolved(), sampler=sampler, batch_size=4),
        )


def test_dynamic_sampling_answers_until_enough_prompts_have_signal():
    answered, module = [], policy(fill=3)

    class Asked(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rollouts = pl_module._last[1]
            index, wrong = rollouts.prompt_index, [1 - r for r in rollouts.rewards.tolist()]
            groups = [[w for i, w in zip(index.tolist(), wrong, strict=True) if i == row] for row in range(12)]
            signal_ = [bool(group) and min(group) < max(group) for group in groups]
            answered.append(([bool(group) for group in groups], signal_))
            assert all(len(group) in (0, 6) for group in groups)
            silent = float(trainer.callback_metrics["rollouts/silent"])
            assert silent == pytest.approx(1 - sum(signal_) / sum(map(bool, groups)))
            shares = module.sample_losses.tolist()
            assert [share == share for share in shares] == answered[-1][0]

    fit(module, Asked(), data=Prompts(HalfSolved(), batch_size=12), max_epochs=6)
    for was_answered, has_signal in answered:
        asked = sum(was_answered)
        assert was_answered == [True] * asked + [False] * (12 - asked)  # from the first on
        assert sum(has_signal) == 3 or asked == 12
        assert sum(has_signal[: asked - 1]) < 3  # and no further than needed
    assert min(sum(was_answered) for was_answered, _ in answered) < 12


def test_dynamic_sampling_is_refused_beside_adaptive_rollouts():
    with pytest.raises(ValueError, match="Argument `fill` must be None beside DifficultyAdaptiveRollouts"):
        fit(policy(fill=3), DifficultyAdaptiveRollouts(n=2, preflight=0))


def test_an_update_is_of_the_answers_with_the_largest_variance():
    seen = []

    class Part(Canned):
        def _update(self, prompts, rollouts, advantage, rows):
            seen.append((rollouts.rewards.clone(), rollouts.prompt_index.clone(), advantage.clone()))
            return super()._update(prompts, rollouts, advantage, rows)

    module = Part(keep="max_variance", kept_answers=2)
    fit(module, max_epochs=1, limit_val_batches=0)
    for rewards, index, advantage in seen:
        for row in index.unique():
            group = rewards[index == row]
            assert len(group) == 2
            torch.testing.assert_close(advantage[index == row], group - group.mean())
    whole = Canned()
    fit(whole, max_epochs=1, limit_val_batches=0)
    assert int(whole.rollouts_made) == int(module.rollouts_made)  # all were made
