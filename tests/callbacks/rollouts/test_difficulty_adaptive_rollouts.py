"""Both stages, whose plan, what is logged, and that a run that was cut off in stage two makes the same plan."""

import logging
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Answering, Answers, Classifier, assert_same_weights, loader, trainer, weights
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import on_two_ranks

from curation.callbacks import DifficultyAdaptiveRollouts, ExactResume
from curation.callbacks.rollouts.checked_rollouts import check_rollouts, prompt_index, successes
from curation.recipes.rollouts.language_models import FromScratch
from curation.recipes.rollouts.policy import PolicyModule
from curation.recipes.rollouts.prompts import Prompts
from curation.recipes.rollouts.tasks import Puzzles
from curation.rollouts.allocation import HardnessWeighted, Neyman, Uniform, plan


class Counted(PolicyModule):
    """Remembers what every call asked for, and what the first stage gave."""

    def __init__(self, **options):
        source = FromScratch("abc=", hidden=16, layers=1, heads=2, context=16)
        super().__init__(source, **{"rollouts": 4, "max_new_tokens": 3, "eval_rollouts": 4, "lr": 1e-2, **options})
        self.calls: list[tuple[bool, np.ndarray, np.ndarray]] = []

    def rollout(self, batch, counts):
        made = super().rollout(batch, counts)
        successes = np.bincount(made.prompt_index, made.rewards, len(counts))
        self.calls.append((self.trainer.training, np.array(counts), successes))
        return made


class Letters(Puzzles):
    """Easy for a model that knows nothing: three letters; every fourth question nobody solves."""

    def score(self, i, answer):
        return float("a" in answer) if i % 4 else 0.0

    def question(self, i):
        return "".join("abc"[i // 3**k % 3] for k in range(3)) + "="


def prompts(**options):
    return Prompts(Letters("sort", 16, 1, 2), **{"batch_size": 6, "holdout": 0.25, **options})


def fit(callback, module=None, data=None, **options):
    seed_everything(3, verbose=False)
    module = module or Counted()
    run = trainer(callback, **{"max_epochs": 2, "num_sanity_val_steps": 0, **options})
    run.fit(module, data or prompts())
    return module, run


@pytest.mark.parametrize(
    ("schedule", "budget"),
    [(HardnessWeighted(std=True), None), (HardnessWeighted(20), 10), (Neyman("log", 12), None)],
)
def test_a_step_makes_the_first_rollouts_and_then_those_of_the_plan(schedule, budget):
    module, run = fit(DifficultyAdaptiveRollouts(schedule, 4, budget, preflight=0))
    training = [call[1:] for call in module.calls if call[0]]
    steps = run.global_step
    assert steps == 4
    while training:
        (counts, successes), *training = training
        assert counts.tolist() == [4] * 6
        extra = plan(schedule, successes, 4, None if budget is None else 6 * budget)
        if extra.any():
            (added, _), *training = training
            assert added.tolist() == extra.tolist()
        if budget is not None:
            assert counts.sum() + extra.sum() <= 6 * budget
            assert extra.any()  # one question in four is never solved
        steps -= 1
    assert steps == 0


def test_evaluation_is_left_alone_and_the_method_comes_back():
    module, _ = fit(DifficultyAdaptiveRollouts(Uniform(9), 4, preflight=0))
    evaluated = [counts for training, counts, _ in module.calls if not training]
    assert [c.tolist() for c in evaluated] == [[4] * 4] * 2
    assert module.rollout.__func__ is Counted.rollout
    assert "rollout" not in vars(module)


def test_what_was_solved_is_logged_before_and_after():
    module, run = fit(DifficultyAdaptiveRollouts(HardnessWeighted(), 4, preflight=0))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    *_, (_, counts, successes) = [call for call in module.calls if call[0] and (call[1] == 4).all()]
    extra = plan(HardnessWeighted(), successes, 4)
    assert logged["rollouts/solve_none"] == pytest.approx((successes == 0).mean())
    assert logged["rollouts/solve_all"] == pytest.approx((successes == 4).mean())
    assert logged["rollouts/per_prompt"] == pytest.approx((counts + extra).mean())
    assert logged["rollouts/solve_none_after"] <= logged["rollouts/solve_none"]
    parts = [logged[f"rollouts/solve_{name}_after"] for name in ("none", "partial", "all")]
    assert sum(parts) == pytest.approx(1)


def test_memory_plans_by_what_was_seen_before_and_is_in_the_checkpoint():
    callback = DifficultyAdaptiveRollouts(HardnessWeighted(), 4, forgetting=0.5, preflight=0)
    module, _ = fit(callback)
    state = callback.state_dict()["memory"]
    assert set(state) == set(range(12))
    assert all(rollouts in (2, 3) for _, rollouts in state.values())  # 4 rollouts halved, once or twice
    assert all(state[i][0] == 0 for i in (0, 4, 8))
    again = DifficultyAdaptiveRollouts(HardnessWeighted(), 4, forgetting=0.5, preflight=0)
    again.setup(trainer(), module, "fit")
    again.load_state_dict(callback.state_dict())
    assert again.state_dict() == callback.state_dict()
    again.teardown(trainer(), module, "fit")


class CutOff(Counted):
    """Fails in the middle of a step's second stage."""

    def __init__(self, at=None, **options):
        super().__init__(**options)
        self.at = at
        self.steps: list[int] = []

    def rollout(self, batch, counts):
        if self.trainer.training and self._steps == self.at and self._calls == 1:
            raise SystemExit
        self.steps.append(self._steps)
        return super().rollout(batch, counts)

    def plans(self):
        """What was asked for in training, and in which step."""
        asked = zip(self.steps, self.calls, strict=True)
        return [(step, counts.tolist()) for step, (training, counts, _) in asked if training]


@pytest.mark.parametrize("forgetting", [None, 0.5])
def test_a_run_cut_off_in_the_second_stage_makes_the_same_plan_again(tmp_path, forgetting):
    def run(folder, at=None, resume=None):
        seed_everything(3 if resume is None else 77, verbose=False)
        module = CutOff(at)
        callback = DifficultyAdaptiveRollouts(HardnessWeighted(), 4, forgetting=forgetting, preflight=0)
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fitting = trainer(callback, ExactResume(), save, enable_checkpointing=True, max_epochs=3)
        with nullcontext() if at is None else pytest.raises(SystemExit):
            fitting.fit(module, prompts(), ckpt_path=resume)
        return module

    whole = run(tmp_path / "whole")
    cut = run(tmp_path / "cut", at=3)
    last = max((tmp_path / "cut").glob("*.ckpt"), key=lambda file: int(file.stem.split("=")[1]))
    resumed = run(tmp_path / "cut", resume=last)
    done = torch.load(last, weights_only=False)["rollouts"]["steps"]
    assert cut.plans()[-1][0] == 3
    assert cut.plans() == whole.plans()[: len(cut.plans())]
    assert resumed.plans() == [(step, plan) for step, plan in whole.plans() if step >= done]
    assert_same_weights(weights(whole), weights(resumed))
    assert whole.rollouts_made == resumed.rollouts_made == sum(sum(plan) for _, plan in whole.plans())


def test_a_forecast_is_printed_before_training_and_changes_nothing(caplog):
    runs = []
    for preflight in (0, 12):
        with caplog.at_level(logging.INFO):
            module, _ = fit(DifficultyAdaptiveRollouts(HardnessWeighted(), 4, preflight=preflight))
        runs.append((weights(module), torch.get_rng_state()))
    assert_same_weights(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    (message,) = [r.message for r in caplog.records if "expected per prompt and step" in r.message]
    assert message.startswith("DifficultyAdaptiveRollouts: accuracy 0.")
    assert "over 12 prompts" in message
    lines = {line[2:26].strip(): line[26:] for line in message.splitlines()[1:]}
    assert list(lines) == [
        "4 each", "8 each", "equal treatment", "equal treatment, std", "hardness weighted", "hardness weighted, std",
        "this fit",
    ]  # fmt: skip
    assert lines["this fit"] == lines["hardness weighted"]
    assert " 4.0 rollouts" in lines["4 each"]


class NoneRight(Counted):
    def rollout(self, batch, counts):
        made = super().rollout(batch, counts)
        made.rewards.zero_()
        return made


def test_no_forecast_is_made_where_no_rollout_is_right(caplog):
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="none of 48 rollouts of 12 prompts earned"):
        fit(DifficultyAdaptiveRollouts(HardnessWeighted(), 4, preflight=12), NoneRight(), max_epochs=1)
    assert not [r for r in caplog.records if "expected per prompt and step" in r.message]


def test_rewards_of_rounding_count_as_what_they_are():
    index = torch.arange(2).repeat_interleave(2)
    rollouts = SimpleNamespace(rewards=torch.tensor([1.0000001, 1, -1e-7, 0]), prompt_index=index, pool=None)
    assert successes(check_rollouts(rollouts, np.array([2, 2])), 2).tolist() == [2, 0]
    rollouts.rewards[0] = 1.0001
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], but has 1.0001"):
        check_rollouts(rollouts, np.array([2, 2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": True}, "Argument `n` must be an integer >= 1, but got True"),
        ({"budget": "16"}, "Argument `budget` must be in .* but got '16'"),
        ({"n": 0}, "Argument `n` must be an integer >= 1, but got 0"),
        ({"n": 8, "budget": 7.5}, r"Argument `budget` must be in \[8, inf\) or None, but got 7.5"),
        ({"forgetting": 1.0}, r"Argument `forgetting` must be in \[0, 1\) or None, but got 1.0"),
        ({"schedule": HardnessWeighted}, "Argument `schedule` must be a schedule, .* but got <class"),
        ({"schedule": Uniform(8)}, "Argument `n` must be .* but Uniform adds none to n = 8"),
        ({"n": 1}, "Argument `n` must be .* but HardnessWeighted adds none to n = 1"),
        ({"preflight": -1}, "Argument `preflight` must be an integer >= 0, but got -1"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        DifficultyAdaptiveRollouts(**arguments)


def test_a_module_without_rollouts_is_refused():
    with pytest.raises(TypeError, match=r"Classifier must have a method `rollout\(batch, counts\)`, but has none"):
        trainer(DifficultyAdaptiveRollouts()).fit(Classifier(), loader(ids=False))


def test_a_module_that_does_not_call_rollout_is_warned_about_once():
    class Silent(Answering):
        def training_step(self, batch, batch_idx):
            return Classifier.training_step(self, batch, batch_idx)

    with pytest.warns(UserWarning, match=r"changes nothing: Silent.training_step did not call") as warned:
        trainer(DifficultyAdaptiveRollouts(preflight=0), max_epochs=2).fit(Silent(), loader(ids=False))
    assert sum("changes nothing" in str(w.message) for w in warned) == 1


def test_rollouts_that_are_not_what_was_asked_for_are_named():
    class Changed(Answering):
        def rollout(self, batch, counts):
            return self.change(super().rollout(batch, counts))

    for change, message in (
        (lambda r: Answers(r.prompt_index[1:], r.rewards[1:]), r"asked for \[8, 8, .* but gave \[63\] rewards"),
        (lambda r: Answers(r.prompt_index + 1, r.rewards), "not as many of each"),
        (lambda r: Answers(r.prompt_index, r.rewards - 2), r"must be in \[0, 1\], but has -"),
        (lambda r: Answers(r.prompt_index, r.rewards * torch.nan), r"must be in \[0, 1\], but has nan"),
        (lambda r: None, "must give an object with `rewards`, but gave NoneType"),
        (lambda r: Answers(r.prompt_index.numpy(), r.rewards), "must be a tensor, but is ndarray"),
    ):
        module = Changed()
        module.change = change
        with pytest.raises((TypeError, ValueError), match=message):
            trainer(DifficultyAdaptiveRollouts(preflight=0)).fit(module, loader(ids=False))


def test_the_older_name_of_prompt_index_is_accepted():
    @dataclass
    class OldAnswers:
        prompts: torch.Tensor
        rewards: torch.Tensor

        def pool(self, other):
            return OldAnswers(*(torch.cat([getattr(x, n) for x in (self, other)]) for n in ("prompts", "rewards")))

    class Old(Answering):
        def rollout(self, batch, counts):
            answers = super().rollout(batch, counts)
            return OldAnswers(answers.prompt_index, answers.rewards)

        def training_step(self, batch, batch_idx):
            rollouts = self.rollout(batch, [2] * len(batch[0]))
            self.answered = torch.bincount(rollouts.prompts)
            return Classifier.training_step(self, batch, batch_idx)

    module = Old()
    callback = DifficultyAdaptiveRollouts(Uniform(9), n=4, preflight=4)
    trainer(callback, max_epochs=1).fit(module, loader(ids=False))
    assert module.answered.tolist() == callback._per_prompt.tolist() == [9] * 8
    both = SimpleNamespace(prompt_index=torch.tensor([1]), prompts=torch.tensor([0]))
    assert prompt_index(both).tolist() == [1]


def test_the_method_comes_back_after_an_exception():
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop")

    module = Counted()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(DifficultyAdaptiveRollouts(preflight=0), Fails()).fit(module, prompts())
    assert "rollout" not in vars(module)


# ---------------------------------------------------------------------- two processes


def of_two_ranks(folder):
    torch.set_num_threads(1)
    callback = DifficultyAdaptiveRollouts(HardnessWeighted(20), 4, 10, forgetting=0.5, preflight=0)
    module, _ = fit(callback, devices=2, strategy="ddp", max_epochs=1)
    calls = [call[1:] for call in module.calls if call[0]]
    torch.save((calls, callback.state_dict()), Path(folder, f"{os.environ['RANK']}.pt"))


def test_two_ranks_make_one_plan_and_each_its_part_of_it(tmp_path):
    on_two_ranks(__file__, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert ranks[0][1] == ranks[1][1]
    assert len(ranks[0][1]["memory"]) == 12
    calls = [calls for calls, _ in ranks]
    assert [first[0].tolist() for first, *_ in calls] == [[4] * 6] * 2
    extra = plan(HardnessWeighted(20), np.concatenate([first[1] for first, *_ in calls]), 4, 120)
    assert extra.sum() == 120 - 48
    assert [[counts.tolist() for counts, _ in added] for _, *added in calls] == [
        [part.tolist()] if part.any() else [] for part in (extra[:6], extra[6:])
    ]


if __name__ == "__main__":
    of_two_ranks(sys.argv[1])
