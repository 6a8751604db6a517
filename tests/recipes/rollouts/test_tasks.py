"""Questions, and answers that are right, wrong, or too much for their scorer."""

import contextlib
import copy
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.recipes.rollouts import rewards
from curation.recipes.rollouts.prompts import Prompts
from curation.recipes.rollouts.rewards import final_answer, number, score
from curation.recipes.rollouts.tasks import Expression, FinalNumber, Puzzles, ReasoningGym, SomeQuestions


@pytest.mark.parametrize("kind", ["sum", "reverse", "sort"])
def test_puzzles_have_one_answer_each_and_are_as_hard_as_they_are_long(kind):
    task = Puzzles(kind, 90, shortest=2, longest=4, seed=3)
    assert len(task) == 90
    assert len({task.question(i) for i in range(90)}) == 90
    assert [task.difficulty(i) for i in range(6)] == [2, 3, 4, 2, 3, 4]
    for i in range(90):
        question, answer = task.question(i).rstrip("="), task.solution(i)
        if kind == "sum":
            assert sum(map(int, question.split("+"))) == int(answer)
            assert {len(part) for part in question.split("+")} == {task.difficulty(i)}
        else:
            assert answer == ("".join(reversed(question)) if kind == "reverse" else "".join(sorted(question)))
        assert task.score(i, f" {answer}\n") == 1
        assert task.score(i, answer + "0") == task.score(i, "") == 0
    assert Puzzles(kind, 90, 2, 4, seed=4).items != task.items
    assert Puzzles(kind, 90, 2, 4, seed=3).items == task.items


def test_more_puzzles_than_there_are_repeat_themselves():
    assert len(Puzzles("sum", 150, 1, 1)) == 150


def test_a_family_of_reasoning_gym_scores_the_final_answer():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, from the [demo] extra")
    task = ReasoningGym("chain_sum", 5, options={"min_terms": 2, "max_terms": 2})
    for i in range(5):
        assert task.question(i).startswith("Answer with the final answer only. ")
        assert task.score(i, f"Let me see.\nThe answer is {task.solution(i)}.") == 1
        assert task.score(i, f"{task.solution(i)}1") == 0
    with pytest.raises(ValueError, match="Argument `name` must be a task family"):
        ReasoningGym("no_such_family")


def families():
    from reasoning_gym.factory import DATASETS

    few = {"spell_backward", "sudoku", "manipulate_matrix", "tower_of_hanoi", "chain_sum", "graph_color", "rearc"}
    names = sorted(DATASETS if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else few)
    return [(name, {} if name != "composite" else COMPOSITE) for name in names]


COMPOSITE = {"datasets": [{"name": "chain_sum", "weight": 1, "config": {}}]}


@pytest.mark.filterwarnings("ignore")
def test_the_answer_of_a_family_has_the_score_that_its_scorer_gives():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, from the [demo] extra")
    wrong = []
    for name, options in families():
        if options:
            from reasoning_gym.composite import DatasetSpec

            options = {"datasets": [DatasetSpec(**spec) for spec in options["datasets"]]}
        task = ReasoningGym(name, 3, seed=1, options=options)
        for i in range(3):
            answer = task.data[i]["answer"]
            expected = float(task.data.score_answer(None if answer is None else str(answer), task.data[i]) == 1)
            if answer is None:
                with pytest.raises(ValueError, match=f"family with answers to learn from, but '{name}' has only"):
                    task.solution(i)
            found = score(task, i, str(answer))
            alone = score(task, i, f"Let me see.\n{answer}")
            if found != (expected, None) or alone != found:
                wrong.append((name, i, expected, found, alone))
    assert wrong == []


def test_a_near_miss_of_a_family_has_no_reward():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, from the [demo] extra")
    task = ReasoningGym("spell_backward", 40, seed=3)
    assert [task.score(i, task.solution(i) + "x") for i in range(40)] == [0] * 40


def test_answers_of_several_lines_after_a_marker():
    matrix = "1 2\n3 4"
    for text in (
        matrix,
        f"So:\n\n{matrix}\n",
        f"The answer is:\n{matrix}\nDone",
        f"#### {matrix}",
        f"\\boxed{{{matrix}}}",
    ):
        assert final_answer(text, lines=2) == matrix
    assert final_answer("1\n\n2", lines=2) == "1\n\n2"
    assert final_answer("1", lines=2) == "1"
    with pytest.raises(ValueError, match="Argument `lines` must be an integer >= 1, but got 0"):
        final_answer("1", lines=0)


def test_word_problems_of_a_file(tmp_path):
    file = tmp_path / "gsm.jsonl"
    rows = [{"question": "How many?", "answer": "Half of 2,400.\n#### 1,200"}, {"question": "Less?", "answer": "-3"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = FinalNumber(str(file))
    assert (len(task), task.question(1)) == (2, "Less?")
    assert task.score(0, "I say 7, so #### 1200.0") == 1
    assert task.score(0, "1201") == task.score(0, "") == 0
    assert task.score(1, "\\boxed{-3}") == 1
    assert len(FinalNumber(str(file), limit=1)) == 1
    file.write_text(json.dumps({"question": "?", "answer": "none"}))
    with pytest.raises(ValueError, match="a number in every answer, but row 0 has none"):
        FinalNumber(str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"must hold questions, but '.*gsm.jsonl' has none"):
        FinalNumber(str(file))


def test_expressions_are_right_however_they_are_written(tmp_path):
    pytest.importorskip("math_verify", reason="needs math-verify, from the [test] extra")
    file = tmp_path / "math.jsonl"
    rows = [
        {"question": "Half?", "answer": "So $\\boxed{\\frac{1}{2}}$."},
        {"question": "Root?", "answer": "$\\sqrt{8}$"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = Expression(str(file))
    assert (len(task), task.question(0), task.solution(1)) == (2, "Half?", "$\\sqrt{8}$")
    assert task.score(0, "It is 0.5") == task.score(0, "$\\boxed{2/4}$") == task.score(1, "$2\\sqrt{2}$") == 1
    assert task.score(0, "0.51") == task.score(0, "") == task.score(1, "3") == 0
    assert score(task, 0, "\\boxed{" * 50)[0] == 0
    rows = [{"question": "?", "answer": answer} for answer in ("$V-v$", r"\frac{1}{2}", r"$\{1,2\}$")]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = Expression(str(file))
    assert task.score(0, "$V-v$") == task.score(0, "$-v+V$") == 1  # capital and small letters are two symbols
    assert task.score(0, "0") == task.score(0, "$v-V$") == task.score(0, "$v-v$") == 0
    corrected = r"\boxed{2}, or rather \boxed{\frac{1}{2}}"
    assert task.score(1, corrected) == 1  # the last box counts
    assert task.score(1, r"\boxed{\frac{1}{2}}, no, \boxed{2}") == task.score(2, r"\boxed{1} \boxed{2}") == 0
    assert task.score(2, r"\boxed{\{2, 1\}}") == 1
    file.write_text(json.dumps({"question": "?", "answer": ""}))
    with pytest.raises(ValueError, match="an expression in every answer, but row 0 has none"):
        Expression(str(file))


@pytest.mark.parametrize(
    ("text", "answer"), [("", ""), ("a\n\n b ", "b"), ("Answer: 5.", "5"), ("#### 1\n#### 2", "2")]
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(("text", "value"), [("", None), ("none", None), ("3 and -1,200.50$", -1200.5), ("$ 7", 7)])
def test_last_numbers(text, value):
    assert number(text) == value


class Odd(Puzzles):
    def __init__(self, what):
        super().__init__(size=1)
        self.what = what

    def score(self, i, answer):
        return self.what() if callable(self.what) else self.what


def test_no_answer_ends_a_run():
    assert score(Odd(0.5), 0, "") == (0.5, None)
    assert score(Odd(lambda: 1 / 0), 0, "") == (0.0, "ZeroDivisionError('division by zero')")
    for value in (2.0, -0.1, float("nan")):
        assert score(Odd(value), 0, "") == (0.0, f"a reward must be in [0, 1], but is {value}")
    before = signal.getsignal(signal.SIGALRM)
    reward, error = score(Odd(lambda: time.sleep(60)), 0, "", seconds=0.05)
    assert reward == 0
    assert error == "TimeoutError('no score after 0.05 s')"
    assert signal.getsignal(signal.SIGALRM) is before


def swallows(error):
    for _ in range(20):
        with contextlib.suppress(error):
            time.sleep(60)
    return 1.0


@pytest.mark.parametrize("error", [Exception, BaseException])
def test_a_scorer_that_goes_on_after_its_time_limit_has_no_reward(error, monkeypatch):
    monkeypatch.setattr(rewards, "REPEAT", 0.01)
    before = signal.getsignal(signal.SIGALRM)
    assert score(Odd(lambda: swallows(error)), 0, "", seconds=0.05) == (0.0, "TimeoutError('no score after 0.05 s')")
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_scorer_may_leave_the_process_and_a_user_may_end_it():
    assert score(Odd(lambda: sys.exit(3)), 0, "") == (0.0, "SystemExit(3)")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Odd(interrupt), 0, "")


def test_rewards_of_one_element_and_of_rounding():
    for value in (np.array([0.5]), np.float32(0.5), torch.tensor([[0.5]]), torch.tensor(0.5)):
        assert score(Odd(value), 0, "") == (0.5, None)
    assert score(Odd(1.0000001), 0, "") == (1.0, None)
    assert score(Odd(-1e-7), 0, "") == (0.0, None)
    assert score(Odd(np.array([0.5, 1.0])), 0, "")[0] == 0
    assert "size 1" in score(Odd(np.array([0.5, 1.0])), 0, "")[1]


# ---------------------------------------------------------------------- prompts


class Repeats(Puzzles):
    """Sums of one digit, of which many come again."""

    def __init__(self, size, seed):
        super().__init__("sum", size, 1, 1, seed=seed)


@given(st.integers(2, 200), st.integers(0, 300), st.floats(0.01, 0.9), st.integers(0, 5))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_no_question_is_repeated_or_both_held_out_and_trained_on(size, warm, holdout, seed):
    task = Repeats(size, seed)
    distinct = len({task.question(i) for i in range(size)})
    prompts = Prompts(task, 1, holdout, warmup=Repeats(warm, seed + 1) if warm else None)
    assert len(prompts.task) == distinct
    batches = [list(loader) for loader in (prompts.train_dataloader(), *prompts.val_dataloader())]
    training, held_out = ([q for batch in part for q in batch["questions"]] for part in batches)
    assert len(training) + len(held_out) == len({*training, *held_out}) == distinct
    warmed = {prompts.solved(i)[0] for i in range(2 * max(warm, size))}
    assert not warmed & {*held_out}
    assert {prompts.task.question(int(i)) for batch in batches[1] for i in batch["ids"]} == {*held_out}
    for i in range(distinct):
        question = prompts.task.question(i)
        assert prompts.task.score(i, prompts.task.solution(i)) == 1
        assert eval(question.rstrip("=")) == int(prompts.task.solution(i))
        assert prompts.task.difficulty(i) == 1


def test_a_task_without_repeats_is_left_as_it_is():
    task, warmup = Puzzles("sort", 30, 5, 5), Puzzles("reverse", 30, 8, 8)
    prompts = Prompts(task, 4, warmup=warmup)
    assert prompts.task is task
    assert prompts.warmup is warmup
    copied = copy.deepcopy(Prompts(Repeats(150, 1), 4).task)
    assert 90 < len(copied) <= 100
    with pytest.raises(ValueError, match="`warmup` must have questions that are not held out"):
        Prompts(task, 4, holdout=0.5, warmup=SomeQuestions(task, range(20, 30)))
    with pytest.raises(ValueError, match="`task` must have 2 different questions or more, but has 1"):
        Prompts(SomeQuestions(task, [3]), 1)
    with pytest.warns(UserWarning, match="all questions of the task are equal"):
        assert Prompts(SomeQuestions(task, [3, 3, 3]), 2).train_size == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "product"}, "Argument `kind` must be 'sum', 'reverse' or 'sort', but got 'product'"),
        ({"size": 0}, "Argument `size` must be an integer >= 1, but got 0"),
        ({"shortest": 4}, "Argument `longest` must be an integer >= 4, but got 3"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Puzzles(**arguments)
