"""The profile of a policy, against its answers; interrupted, and as the start of a memory."""

import multiprocessing
import os
import signal

import pyarrow.parquet as pq
import pytest
import torch
from helpers import trainer
from lightning.pytorch import Callback, seed_everything

from curation.recipes import cli
from curation.recipes.rollouts.language_models import FromScratch
from curation.recipes.rollouts.policy import PolicyModule
from curation.recipes.rollouts.profile import profile
from curation.recipes.rollouts.prompts import Prompts
from curation.recipes.rollouts.tasks import Puzzles
from curation.samplers import PromptSampler


class Letters(Puzzles):
    """Even questions are always right."""

    def __init__(self, name="a"):
        super().__init__("sort", 16, 1, 2)
        self.name = name
        self.asked = []
        self.kill_at = None

    def question(self, i):
        return self.name + "".join("abc"[i // 3**k % 3] for k in range(3)) + "="

    def score(self, i, answer):
        self.asked.append(i)
        if len(self.asked) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return float(i % 2 == 0 or "a" in answer)


class Answers(Callback):
    def __init__(self):
        self.lengths, self.rewards = {}, {}

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, *args):
        for row, i in enumerate(batch["ids"].tolist()):
            self.lengths[i] = float(outputs.completions.lengths[outputs.prompt_index == row].float().mean())
            self.rewards[i] = float(outputs.rewards[outputs.prompt_index == row].mean())


def run(path, task=None, settings="", **options):
    seed_everything(3, verbose=False)
    answers, source = Answers(), FromScratch("abc=", hidden=16, layers=1, heads=2, context=16)
    module = PolicyModule(source, rollouts=6, max_new_tokens=3, **options)
    data = Prompts(task or Letters(), batch_size=6, eval_batch_size=5)
    return profile(trainer(answers), module, data, path, settings=settings), answers, data


def test_it_holds_what_was_answered(tmp_path):
    memory, answers, data = run(tmp_path / "profile.parquet")
    table = pq.read_table(tmp_path / "profile.parquet")
    assert table["pass_rate"].to_pylist() == pytest.approx([answers.rewards[i] for i in range(12)])
    assert table["length"].to_pylist() == pytest.approx([answers.lengths[i] for i in range(12)])
    assert min(table["seconds"].to_pylist()) > 0
    assert table["trials"].to_pylist() == [6] * 12
    assert (memory.solved > 0).tolist() == [answers.rewards[i] == 1 for i in range(12)]
    sampler = PromptSampler(data.prompts, 4, rule="drop_solved", answers=6, start=tmp_path / "profile.parquet")
    assert torch.equal(sampler.memory.rate, memory.rate)


def killed(path):
    task = Letters()
    task.kill_at = 5 * 6 + 8  # in the second batch
    run(path, task)


def test_after_a_kill_it_goes_on(tmp_path):
    path = tmp_path / "profile.parquet"
    process = multiprocessing.get_context("fork").Process(target=killed, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert pq.read_table(path)["visits"].to_pylist() == [1] * 5 + [0] * 7  # no finished batch is lost
    memory, _, data = run(path)
    assert set(data.task.asked) == set(range(5, 12))
    assert memory.visits.tolist() == [1] * 12
    with pytest.raises(FileExistsError, match="Argument `--output` must name a new file"):
        run(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "profile.parquet"
    run(path)
    with pytest.raises(ValueError, match="is of other prompts"):
        run(path, Letters("b"))
    with pytest.raises(ValueError, match="Argument `--output` must name a file of the same settings"):
        run(path, settings="others")


def test_a_model_without_its_warm_up_is_told(tmp_path):
    with pytest.warns(UserWarning, match="of the model without its warm-up"):
        run(tmp_path / "profile.parquet", warmup_steps=3)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["rollouts", "profile", "--config", "rollouts_tiny", "--output", "p.parquet", "--model.rollouts=2"]
    args += ["--model.warmup_steps=0", "--data.task.size=20", "--data.seen=0", "--data.batch_size=4"]
    args += ["--trainer.logger=false"]
    cli.main(args)
    assert "15 prompts, 30 answers" in capsys.readouterr().out
    assert pq.read_table("p.parquet").num_rows == 15
    with pytest.raises(SystemExit, match="Argument `--ckpt_path` must name a checkpoint, but there is no 'none'"):
        cli.main([*args, "--ckpt_path=none"])
    with pytest.raises(SystemExit, match="a recipe with a PolicyModule and Prompts"):
        cli.main(
            ["rollouts", "profile", "--config", "fashion_mnist_noisy", "--data.data=digits", "--output=q.parquet"]
        )
