"""What the README shows runs, and what it claims was measured."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from processes import fit_in_this_process

from curation.recipes import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(README)
PROGRAMS = ("curation", "make", "pip")
COMMANDS = [
    line
    for language, text in BLOCKS
    if not language
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith(tuple(f"{program} " for program in PROGRAMS))
]


def test_it_fits_a_screen_or_two():
    assert len(README.splitlines()) <= 90


def test_it_shows_every_kind_of_command():
    assert {command.split()[0] for command in COMMANDS} == set(PROGRAMS)
    assert {"make demo", "make test"} <= {command.partition("#")[0].strip() for command in COMMANDS}


def test_its_python_runs_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scripts = [text for language, text in BLOCKS if language == "python"]
    assert len(scripts) == 2
    torch.manual_seed(0)
    namespace = {}
    exec(compile(scripts[0], "README.md", "exec"), namespace)
    (printed,) = re.findall(r"print\(.*\)  # (.*)", scripts[0])
    assert capsys.readouterr().out.splitlines()[-1] == printed
    (tmp_path / "my_rule.py").write_text(scripts[1])
    exec(compile(scripts[1], "my_rule.py", "exec"), namespace)
    trainer = namespace["Trainer"](max_steps=2, callbacks=[rule := namespace["HighLoss"](keep=0.25)])
    trainer.fit(namespace["Classifier"](), namespace["loader"])
    assert (rule.samples_scored, rule.samples_trained) == (64, 16)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command.split()[:2]))
def test_its_commands_run(command, tmp_path, monkeypatch, capsys):
    """Each is run, but in small.

    ``make``: which commands it would run; those of `make demo` are tested with their figures in
    ``tests/recipes/cli/test_demo.py``, and `make test` runs this. ``pip``: without what it would download, and only
    until it would install; ``test_packaging.py`` installs. ``curation compare``: one seed, ten steps, and the fits
    in this process; ``tests/recipes/compare/test_compare.py`` has them in processes of their own.
    """
    program, *args = shlex.split(command, comments=True)
    if program == "make":
        run = subprocess.run(["make", "--dry-run", "-C", str(ROOT), *args], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert {"demo": "recipes.cli.demo", "test": "pytest"}[args[0]] in run.stdout
    elif program == "pip":
        assert args[0] == "install"
        small = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation"]
        pip = [sys.executable, "-m", "pip", "install", *small, *args[1:]]
        run = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "Would install lightning-curation-" in run.stdout
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WANDB_MODE", "disabled")
        monkeypatch.setattr("sys.path", list(sys.path))
        fit_in_this_process(monkeypatch)
        assert args[0] == "compare"
        small = ["--seeds=1", "--jobs=1", "--trainer.max_steps=10", "--trainer.val_check_interval=5"]
        cli.main([*args, *small])
        wandb.finish()
        shown = capsys.readouterr().out
        for arm in ("full", "uniform", "loss", "importance"):
            assert re.search(rf"^ {arm} +0\.\d+", shown, re.MULTILINE), shown
        assert list(tmp_path.glob("runs/compare/fashion_mnist_noisy/report.html"))


def test_its_figures_are_in_the_pages_that_say_where_they_come_from():
    figure = re.compile(r"([+-][\d.]+)[^\[\]|]{0,40}(\[[+-][^\]]*\])")  # with its interval
    pages = [(ROOT / "docs" / page).read_text() for page in ("which_method.md", "results/README.md")]
    measured = {pair for page in pages for pair in figure.findall(page)}
    shown = figure.findall(README[: README.index("## Install")])
    assert len(shown) >= 6
    assert not [pair for pair in shown if pair not in measured]


def seeds_ahead(report, arm, baseline):
    """Seeds with which a baseline is ahead of an arm at the seconds where the shorter of the two runs ends."""
    (workload,) = json.loads((ROOT / f"docs/results/{report}.json").read_text())["workloads"]
    curves = {(run["arm"], run["seed"]): run["points"] for run in workload["runs"]}
    ahead = 0
    for seed in {seed for _, seed in curves}:
        end = min(curves[name, seed][-1]["seconds"] for name in (arm, baseline))
        reached, baseline_reached = (
            [point["value"] for point in curves[name, seed] if point["seconds"] <= end][-1]
            for name in (arm, baseline)
        )
        ahead += baseline_reached > reached if workload["mode"] == "max" else baseline_reached < reached
    return ahead


@pytest.mark.parametrize(
    ("report", "arm", "baseline", "seeds"),
    [
        ("fashion_mnist_noisy", "reducible_loss", "full", 4),
        *(
            ("fashion_mnist_noisy", arm, "full", 5)
            for arm in ("loss", "rank", "cdf", "importance", "reducible_loss_wrong")
        ),
        ("sft_utility_diversity", "utility_diversity", "uniform", 5),
        ("sft_utility_diversity", "loss", "uniform", 5),
        ("fashion_mnist_long_tail", "full", "diversity", 5),
        ("fashion_mnist_long_tail", "uniform", "diversity", 5),
    ],
)
def test_what_was_ahead_at_equal_seconds(report, arm, baseline, seeds):
    """As docs/which_method.md says it."""
    assert seeds_ahead(report, arm, baseline) == seeds


def test_the_output_of_the_comparison_is_that_of_its_guide():
    guide = (ROOT / "docs/compare.md").read_text()
    rows = re.findall(r"^ (?:arm|full|uniform|loss|importance) .*$", README, re.MULTILINE)
    assert len(rows) == 5
    assert not [row for row in rows if row not in guide]


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 15
    assert not [link for link in links if not (ROOT / link).exists()]
