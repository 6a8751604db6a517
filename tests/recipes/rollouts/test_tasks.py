"""Questions, and answers that are right, wrong, or too much for their scorer."""

import json
import signal
import time

import pytest

from curation.recipes.rollouts.rewards import final_answer, number, score
from curation.recipes.rollouts.tasks import Expression, FinalNumber, Puzzles, ReasoningGym


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
