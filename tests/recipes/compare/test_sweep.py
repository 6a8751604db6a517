"""A sweep of budgets: real runs with a known cost ratio, what is refused, and what the report says."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from curation.recipes import cli
from curation.recipes.catalogue import find_recipe
from curation.recipes.compare import comparison, options, processes, report, verdict
from curation.recipes.compare.arms import make_arm
from curation.recipes.compare.equal_quality import failed_runs, notes, sentences, table
from curation.recipes.compare.run import Run
from curation.recipes.compare.schedule import schedule
from curation.recipes.compare.summary import build
from curation.recipes.compare.workload import make_workload

RECIPE = "fashion_mnist_noisy"
SWEEP = ["sweep.yaml", "--metric=val_accuracy", "--keep=0.25", "--seeds=3", "--jobs=1", "--out=out",
         "--budget=steps=12", "--budget-sweep=0.5,1", "--sweep-arms=same"]  # fmt: skip


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The folders of runs in the order in which they ran, each a fit in this process: imports take eight seconds.

    The recipe has an arm `same`, which is the arm `full` by another name, and no logger but `metrics.csv`.
    """
    recipe = yaml.safe_load(find_recipe(RECIPE).read_text())
    recipe["data"]["init_args"] |= {"data": "digits", "label_noise": 0.0}
    recipe["trainer"] |= {"logger": None, "val_check_interval": 12, "enable_model_summary": False}
    same = {"class_path": "curation.callbacks.UniformSelection", "init_args": {"keep": 1.0}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**recipe, "arms": {"same": {"callbacks": [same]}}}))
    folders = []

    def fit(run, cwd, threads, server):
        with processes.begin(run) as held:
            if held is not None:
                folders.append(str(run.folder.relative_to(tmp_path / "out/sweep")))
                cli.main(["fit", "--config", str(run.folder / "fit.yaml")])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "fit", fit)
    return folders


def test_a_sweep_of_real_runs(ran, tmp_path, monkeypatch, capsys):
    """An arm that does what full does costs what full costs: a ratio of 1, in every metric."""
    with pytest.warns(UserWarning, match="2 budgets say little of the curves between; 4 are a start"):
        cli.main(["compare", *SWEEP])
    assert "same: reaches full's val_accuracy at " in capsys.readouterr().out
    (w,) = json.loads((tmp_path / "out/report.json").read_text())["workloads"]
    assert w["arms"] == ["full", "uniform", "same"]
    assert [(run["arm"], run["points"][-1]["step"]) for run in w["runs"]] == [(arm, 12) for arm in w["arms"]] * 3
    swept = [(run["share"], run["step"], run["seed"], run["arm"]) for run in w["sweep"]["runs"]]
    assert swept == [
        (share, 12 * share, seed, arm) for share in (0.5, 1) for seed in range(3) for arm in ("full", "same")
    ]
    assert w["cost_ratio"]["same"]["flops"] == pytest.approx([1, 1, 1], abs=0.01)
    measured = [run["seconds"] for run in w["sweep"]["runs"] if (run["arm"], run["share"]) == ("full", 1)]
    assert measured == [run["points"][-1]["seconds"] for run in w["runs"] if run["arm"] == "full"]
    assert w["sweep"]["metrics"] == {"val_accuracy": "max", "val_loss": "min"}
    for metric, found in w["equal_quality"].items():
        quality = np.mean([r["metrics"][metric] for r in w["sweep"]["runs"] if (r["arm"], r["share"]) == ("full", 1)])
        assert found["quality"] == pytest.approx(quality)
        assert found["rise"][0] > 0.05
        assert found["arms"]["same"]["flops"]["ratio"] == pytest.approx(1, abs=0.001)
    assert {f.parent.name for f in (tmp_path / "out/sweep").glob("budget-*/*")} == {"budget-0.5"}
    config = yaml.safe_load((tmp_path / "out/sweep/budget-0.5/full-1/fit.yaml").read_text())["trainer"]
    assert (config["max_steps"], config["val_check_interval"]) == (6, 6)  # schedules end with it; as many looks

    page = (tmp_path / "out/report.html").read_text()
    assert "Cost at equal quality" in page
    assert "same: reaches full&#x27;s val_accuracy at" in page
    assert "cost over full's" in (tmp_path / "out/report.svg").read_text()
    files = {kind: (tmp_path / f"out/report.{kind}").read_bytes() for kind in ("json", "html", "png", "svg")}
    cli.main(["report", "out/report.json"])
    assert {kind: (tmp_path / f"out/report.{kind}").read_bytes() for kind in files} == files

    calls, execute = [], comparison.execute

    def recorded(runs, title, backend, jobs, server):
        calls.append((jobs, {run.seed for run in runs}, len(runs)))
        execute(runs, title, backend, 1)

    monkeypatch.setattr(comparison, "execute", recorded)
    for name in ("budget-0.5/same-1", "same-0"):
        shutil.rmtree(tmp_path / "out/sweep" / name)
    ran.clear()
    cli.main(["compare", *SWEEP, "--jobs=2"])  # goes on; what is left of seed 0 goes first, alone
    assert ran == ["same-0", "budget-0.5/same-1"]
    assert calls == [(1, {0}, 4), (2, {0, 1, 2}, 15)]
    with pytest.raises(SystemExit, match=r"Argument `--out` must be a new folder.*budget-0\.5.*: 6 there, 7 here"):
        cli.main(["compare", *SWEEP, "--budget=steps=14"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget-sweep=1"], "must be at least two positive shares of the budget, rising, with 1 .* but got '1'"),
        (["--budget-sweep=0.5,2"], "Argument `--budget-sweep` must be .*but got '0.5,2'"),
        (["--budget-sweep=1,0.5"], "Argument `--budget-sweep` must be .*but got '1,0.5'"),
        (["--budget-sweep=1,1,2"], "Argument `--budget-sweep` must be .*but got '1,1,2'"),
        (["--budget-sweep=0,1"], "Argument `--budget-sweep` must be .*but got '0,1'"),
        (["--budget-sweep=-1,1"], "Argument `--budget-sweep` must be .*but got '-1,1'"),
        (["--budget-sweep=1,inf"], "Argument `--budget-sweep` must be .*but got '1,inf'"),
        (["--budget-sweep=1,nan"], "Argument `--budget-sweep` must be .*but got '1,nan'"),
        (["--budget-sweep=half,1"], "Argument `--budget-sweep` must be .*but got 'half,1'"),
        (
            ["--budget-sweep=0.25,0.5,1,2", "--budget=seconds"],
            "Argument `--budget-sweep` needs a `--budget` in steps",
        ),
        (["--sweep-arms=loss"], "Argument `--sweep-arms` must be left out without `--budget-sweep`"),
        (
            ["--budget-sweep=0.25,0.5,1,2", "--sweep-arms=los"],
            f"Argument `--sweep-arms` must name arms of {RECIPE}, full, uniform, loss, but got 'los'",
        ),
        (["--methods=short", "--budget=seconds"], "Argument `--budget` must not be seconds with the arm 'short'"),
    ],
)
def test_rubbish_is_refused_at_once(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"(?s)^curation: .*{message}"):
        cli.main(["compare", RECIPE, "--methods=loss", "--metric=val_accuracy", *args])
    assert not (tmp_path / "runs").exists()


REHEARSED = {
    "full": (2560, 900.0),
    "uniform": (256, 90.0),
    "short": (2560, 900.0),
    "loss": (256, 300.0),
}  # of 8 steps


def scheduled(tmp_path, monkeypatch, *args):
    """The steps of every run, by its folder."""
    monkeypatch.chdir(tmp_path)
    given = [
        RECIPE,
        "--methods=short,loss",
        "--metric=val_accuracy",
        "--out=out",
        "--seeds=1",
        "--data.data=digits",
        *args,
    ]
    asked, overrides = options.parse(given)
    w = make_workload(RECIPE, overrides, asked)
    for name, (samples, flops) in REHEARSED.items():
        w.rehearsals[name] = run = Run(name, 0, tmp_path / name, {})
        run.folder.mkdir()
        result = {"points": [{"step": 8, "samples_trained": samples}], "flops_per_step": flops, "total_steps": 1000}
        times = {"steps_per_epoch": 150, "finished": True, "seconds_per_step": 1.0}
        (run.folder / "run.json").write_text(json.dumps({**result, **times}))
    schedule(w, asked)
    return {
        str(run.folder.relative_to(w.folder)): (run.config["trainer"]["max_steps"], run.config["trainer"])
        for run in w.all_runs
    }


@pytest.mark.parametrize(
    ("unit", "loss", "full"), [("steps", 1000, 1000), ("samples", 1000, 100), ("flops", 300, 100)]
)
def test_every_budget_has_its_length_and_short_the_samples_of_uniform(tmp_path, monkeypatch, unit, loss, full):
    args = (f"--budget={unit}", "--budget-sweep=0.25,0.5,1,2", "--sweep-arms=loss")
    runs = scheduled(tmp_path, monkeypatch, *args)
    assert {name: steps for name, (steps, _) in runs.items()} == {
        "full-0": full,
        "uniform-0": 1000,
        "short-0": 100,
        "loss-0": loss,
        **{
            f"budget-{share:g}/{arm}-0": share * steps
            for share in (0.25, 0.5, 2)
            for arm, steps in (("full", full), ("loss", loss))
        },
    }
    for name, (steps, trainer) in runs.items():
        assert trainer["callbacks"][-1]["init_args"]["max_steps"] == steps
        assert trainer["val_check_interval"] == round(steps / 10)  # as many looks
        group = trainer["logger"][-1]["init_args"]["group"]
        assert group == "/".join(["out", *Path(name).parts[:-1]])


def test_short_is_swept_with_uniform(tmp_path, monkeypatch):
    runs = scheduled(tmp_path, monkeypatch, "--budget-sweep=0.25,0.5,1,2")
    assert [runs[f"budget-0.5/{arm}-0"][0] for arm in ("full", "uniform", "short")] == [500, 500, 50]


def test_budgets_of_the_same_length_are_refused(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"`--budget-sweep` must give every arm different lengths.*'full'.* 1, 1, 2 st"
    ):
        scheduled(tmp_path, monkeypatch, "--budget=steps=1", "--budget-sweep=0.5,0.75,1,2")


def test_short_is_the_full_of_a_recipe():
    full = {"data.sampler": None, "callbacks": [{"class_path": "curation.callbacks.HardBatchTraining"}]}
    short, of_recipe = (
        make_arm("short", {"arms": {"full": full}}, None),
        make_arm("full", {"arms": {"full": full}}, None),
    )
    assert (short.name, short.callbacks, short.overrides) == ("short", of_recipe.callbacks, of_recipe.overrides)
    assert make_arm("short", {}, None).callbacks == make_arm("full", {}, None).callbacks


# ---------------------------------------------------------------------- what a report says

SHARES = [0.25, 0.5, 1.0, 2.0]
EQUAL = {"share": 1.0, "arm": "full", "seed": 0, "error": None, "wall_seconds": 36.0, "samples_trained": 8}


def content(rise=0.05, seeds=5, jobs=1, **ratios):
    """A sweep in which accuracy rises by the logarithm of the cost, and the methods have known ratios."""
    draw = np.random.default_rng(0)
    arms, runs, swept = {"full": 1.0, "uniform": 1.0, **ratios}, [], []
    for seed in range(seeds):
        of_seed = draw.normal(0, 0.01)
        for arm, ratio in arms.items():
            for share in SHARES:
                accuracy = 0.8 + rise * math.log(share / ratio) + of_seed + draw.normal(0, 0.001)
                metrics = {"val_accuracy": accuracy, "val_loss": 1 - accuracy}
                cost = {"step": int(100 * share), "seconds": 2 * share * (1 + 0.01 * seed), "flops": 1e9 * share}
                if arm != "uniform":
                    swept.append({**EQUAL, "share": share, "arm": arm, "seed": seed, **cost, "metrics": metrics})
            point = {"step": 100, "seconds": 2.0, "samples_trained": 8, "samples_scored": 0, "value": accuracy}
            more = {"flops_per_step": 1e7, "wall_seconds": 36.0, "peak_memory": 1, "device": "CPU", "torch": "2"}
            runs.append({"arm": arm, "seed": seed, "error": None, **more, "points": [point]})
    budget, modes = {"unit": "steps", "amount": 100.0}, {"val_accuracy": "max", "val_loss": "min"}
    sweep = {"shares": SHARES, "arms": [arm for arm in arms if arm != "uniform"], "metrics": modes, "runs": swept}
    return {"name": "a", "metric": "val_accuracy", "mode": "max", "budget": budget, "target": None, "jobs": jobs,
            "arms": list(arms), "runs": runs, "sweep": sweep}  # fmt: skip


def built(workload):
    return build("curation compare a --budget-sweep=0.25,0.5,1,2", [workload])


def test_ratios_bounds_and_sentences(tmp_path):
    whole = built(content(half=0.5, twice=1.5, never=4.0, always=0.1))
    (w,) = whole["workloads"]
    ratios = w["cost_ratio"]
    for arm, truth in (("half", 0.5), ("twice", 1.5)):
        for unit in ("flops", "seconds"):
            mean, low, high = ratios[arm][unit]
            assert low < truth < high
            assert mean == pytest.approx(truth, rel=0.05)
            assert high - low < 0.2
    assert ratios["never"] == ratios["always"] == {"flops": None, "seconds": None}
    assert w["equal_quality"]["val_loss"]["arms"]["half"]["flops"]["ratio"] == pytest.approx(
        ratios["half"]["flops"][0]
    )
    texts = dict(zip(w["sweep"]["arms"][1:], sentences(w), strict=True))
    interval = r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]"
    assert texts["half"][0] == "won"
    pattern = rf"half: reaches full's val_accuracy at {interval} of its time and {interval} of its FLOPs\."
    assert re.fullmatch(pattern, texts["half"][1])
    assert texts["twice"][0] == "lost"
    lost = "never: does not reach full's val_accuracy within 2.00 times its time and 2.00 times its FLOPs."
    assert texts["never"] == ("lost", lost)
    assert texts["always"][0] == "won"
    assert (
        "always: is better than full's val_accuracy with its smallest budget already, 0.25 of" in texts["always"][1]
    )
    assert w["summary"]["hours"] == pytest.approx(0.01 * (6 + 5 * 3) * 5)  # of all runs, each once
    report.write(whole, tmp_path / "report")
    text = (tmp_path / "report.json").read_text()
    assert report.as_json(report.read(tmp_path / "report.json")) == text
    assert text.count('"share": 0.25') == 25


def test_the_length_of_short_is_told():
    (with_short,), (without,) = (built(content(**{arm: 1.0}))["workloads"] for arm in ("short", "half"))
    assert "Every run had 100 steps (short: as many samples as uniform);" in verdict.notes(with_short)[0]
    assert "Every run had 100 steps;" in verdict.notes(without)[0]


def test_a_plateau_has_no_ratio(tmp_path, capsys):
    whole = built(content(rise=0.0, half=0.5))
    (w,) = whole["workloads"]
    assert w["cost_ratio"] == {"half": {"flops": None, "seconds": None}}
    assert w["equal_quality"]["val_accuracy"]["plateau"]
    report.write(whole, tmp_path / "report")
    report.show(whole, tmp_path / "report")
    assert capsys.readouterr().out.count("No cost ratio, plateau: the rise of full's val_accuracy") == 1
    assert "<td>plateau</td><td>plateau</td>" in (tmp_path / "report.html").read_text()
    assert "plateau: a ratio is worth nothing" in (tmp_path / "report.svg").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"error": "out of memory"}, "half, seed 1, 0.5 of the budget: out of memory"),
        ({"metrics": {"val_accuracy": None, "val_loss": 1.0}}, "half, seed 1, 0.5 of the budget: it diverged"),
    ],
)
def test_a_run_of_the_sweep_that_failed_is_never_dropped(tmp_path, capsys, change, told):
    workload = content(half=0.5, other=0.7)
    (run,) = (r for r in workload["sweep"]["runs"] if (r["arm"], r["seed"], r["share"]) == ("half", 1, 0.5))
    run |= change
    whole = built(workload)
    (w,) = whole["workloads"]
    assert failed_runs(w) == [told]
    assert report.failed(w)
    failed = ("failed", "half: no cost ratio, 1 of 20 runs of half failed or diverged.")
    assert sentences(w)[0] == failed
    assert sentences(w)[1][0] == "won"  # the other arm has its ratio
    assert w["cost_ratio"]["half"] == {"flops": None, "seconds": None}
    report.write(whole, tmp_path / "report")
    report.show(whole, tmp_path / "report")
    assert told in capsys.readouterr().out
    assert not report.failed(built(content(half=0.5))["workloads"][0])


@pytest.mark.parametrize("arms", [["full"], ["full", "half"]])
def test_nothing_that_ran_is_no_reason_to_fail(tmp_path, arms):
    workload = content(half=0.5)
    for run in workload["sweep"]["runs"]:
        if run["arm"] in arms:
            run |= {"error": "it was not run", "metrics": {}, "step": 0, "seconds": 0.0, "flops": 0.0}
    whole = built(workload)
    report.write(whole, tmp_path / "report")
    assert sentences(whole["workloads"][0])[0][1].startswith("half: no cost ratio, 20 of 20 runs of full failed")
    assert whole["workloads"][0]["cost_ratio"] == {"half": {"flops": None, "seconds": None}}


def test_one_seed_says_nothing(tmp_path):
    whole = built(content(seeds=1, half=0.5))
    assert sentences(whole["workloads"][0]) == [
        ("even", "half: no cost ratio, one seed says nothing about a difference.")
    ]
    report.write(whole, tmp_path / "report")
    assert "one seed says nothing about a difference" in (tmp_path / "report.html").read_text()


def test_seconds_of_runs_side_by_side_are_those_of_seed_0(tmp_path):
    (alone,), (beside,) = (built(content(jobs=jobs, half=0.5))["workloads"] for jobs in (1, 2))
    assert table(alone, "half", "seconds")[:, 2].tolist() == pytest.approx([2.0, 2.02, 2.04, 2.06, 2.08])
    assert table(beside, "half", "seconds")[:, 2].tolist() == [2.0] * 5
    assert notes(beside)[-1].startswith("In the ratios, seconds are those of seed 0")
    assert len(notes(alone)) == 1


def test_costs_that_do_not_rise_have_no_ratio():
    workload = content(half=0.5)
    for run in workload["sweep"]["runs"]:
        run["seconds"] = 1.0
    (w,) = built(workload)["workloads"]
    assert w["cost_ratio"]["half"]["seconds"] is None
    assert w["equal_quality"]["val_loss"]["arms"]["half"]["seconds"]["reason"] == (
        "the seconds of full do not rise with the budget"
    )
    assert re.fullmatch(r"half: reaches full's val_accuracy at [\d\., \[\]]+ of its FLOPs\.", sentences(w)[0][1])


def test_the_ratios_are_a_table_of_the_wandb_run(tmp_path):
    report.write(built(content(half=0.5)), tmp_path / "report")
    code = """
import pathlib
from curation.recipes.compare import report
report.log_to_wandb(report.read(pathlib.Path("report.json")), pathlib.Path("report"), None, "group")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/compare/cost_ratio_*.json")
    rows = json.loads(file.read_text())["data"]
    assert [row[:3] for row in rows] == [["a", "half", "val_accuracy"], ["a", "half", "val_loss"]]
    assert re.fullmatch(r"0\.\d\d \[0\.\d\d, 0\.\d\d\]", rows[0][-1])
