"""`curation compare`, with real runs on real images: what it finds, what a kill costs, what it refuses."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from jsonargparse import get_loader

from curation.recipes import cli
from curation.recipes.catalogue import find_recipe
from curation.recipes.cli import compare as command
from curation.recipes.cli import lightning_cli, yaml_text
from curation.recipes.compare import arms, processes, rehearsal, resume
from curation.recipes.compare.comparison import collect
from curation.recipes.compare.run import Run
from curation.recipes.compare.schedule import schedule
from curation.recipes.compare.workload import Workload, make_workload, metric_and_mode, mode_of_name

BROKEN = """
from curation.callbacks import UniformSelection


class Breaks(UniformSelection):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.seed == 1 and trainer.global_step == 10:
            raise RuntimeError("this arm breaks")
"""
RECIPE = "fashion_mnist_noisy"
SMALL = ["--data.data=digits", "--trainer.max_steps=24", "--trainer.val_check_interval=12", "--out=out"]
COMMAND = [sys.executable, "-m", "curation.recipes.cli", "compare"]
COMPARE = [RECIPE, "--methods=loss,broken.Breaks", "--metric=val_accuracy", "--seeds=2", "--jobs=2", *SMALL]


@pytest.fixture(autouse=True)
def as_found(monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    yield
    sys.modules.pop("broken", None)


def here(folder, monkeypatch):
    (folder / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(folder)


def without_clocks(folder):
    content = json.loads((folder / "out/report.json").read_text())
    for w in content["workloads"]:
        del w["summary"]
        for run in w["runs"]:
            for part in (run, *run["points"]):
                for key in ("seconds", "wall_seconds", "peak_memory"):
                    part.pop(key, None)
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted comparison, in which one of eight runs fails."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "broken.py").write_text(BROKEN)
    # In a process of its own, as a user's: W&B keeps state in this one from other tests.
    assert subprocess.run([*COMMAND, *COMPARE], cwd=folder, check=False).returncode == 1
    return folder


def test_every_arm_is_run_with_every_seed(whole):
    (w,) = json.loads((whole / "out/report.json").read_text())["workloads"]
    assert w["arms"] == ["full", "uniform", "loss", "broken.Breaks"]
    assert [(run["arm"], run["seed"]) for run in w["runs"]] == [(arm, seed) for seed in (0, 1) for arm in w["arms"]]
    assert (w["metric"], w["mode"], w["budget"]) == ("val_accuracy", "max", {"unit": "steps", "amount": 24})
    for run in w["runs"]:
        if run["error"] is None:
            assert [p["step"] for p in run["points"]] == [12, 24]
            assert run["points"][-1]["samples_scored"] == (6900 if run["arm"] == "loss" else 0)
    trained = {run["arm"]: run["points"][-1]["samples_trained"] for run in w["runs"] if run["error"] is None}
    # 1438 images in batches of 320, the last of which has 158
    assert trained == {"full": 6900, "uniform": 24 * 32, "loss": 24 * 32, "broken.Breaks": 24 * 32}
    assert w["summary"]["full"]["flops"] / w["summary"]["uniform"]["flops"] == pytest.approx(288 / 32, rel=0.05)


def test_a_seed_makes_a_pair(whole):
    """The first weights, the noise and the candidates are those of the seed: the same rule gives the same run."""
    (w,) = json.loads((whole / "out/report.json").read_text())["workloads"]
    values = {(r["arm"], r["seed"]): [p["value"] for p in r["points"]] for r in w["runs"]}
    assert values["uniform", 0] == values["broken.Breaks", 0]
    assert values["uniform", 0] != values["uniform", 1]
    wrong = {}
    for arm in ("full", "loss"):
        with (whole / "out" / RECIPE / f"{arm}-0/metrics.csv").open(newline="") as rows:
            wrong[arm] = [row["curation/all_corrupted"] for row in csv.DictReader(rows)]
    assert any(wrong["full"])
    assert wrong["full"] == wrong["loss"]  # of all candidates


def test_a_failed_run_is_reported(whole, capsys):
    (w,) = json.loads((whole / "out/report.json").read_text())["workloads"]
    failed = [(run["arm"], run["seed"], run["error"]) for run in w["runs"] if run["error"]]
    assert failed == [("broken.Breaks", 1, "RuntimeError: this arm breaks")]
    assert w["summary"]["broken.Breaks"]["failed"] == 1
    page = (whole / "out/report.html").read_text()
    assert "broken.Breaks: no verdict, 1 of 2 runs of broken.Breaks failed" in page
    assert "RuntimeError: this arm breaks" in page


def test_each_run_is_an_ordinary_fit_with_its_metrics_and_its_wandb_run(whole):
    for arm in ("full", "uniform", "loss"):
        folder = whole / "out" / RECIPE / f"{arm}-1"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["seed_everything"] == 1
        assert config["data"]["init_args"]["data"] == "digits"
        assert config["trainer"]["callbacks"][-2]["init_args"]["seed"] == 1
        assert config["trainer"]["logger"][-1]["init_args"]["group"] == "out"
        assert config["trainer"]["logger"][-1]["init_args"]["job_type"] == arm
        assert "val_accuracy" in (folder / "metrics.csv").read_text().splitlines()[0]
        assert list(folder.glob("wandb/offline-run-*/*.wandb"))
        assert not list(folder.glob("**/*.ckpt"))
    assert list(whole.glob("out/wandb/offline-run-*/*.wandb"))


def test_a_killed_comparison_goes_on_and_says_the_same(whole, tmp_path, monkeypatch):
    """It is killed after two runs of its own, and began with three finished ones and the rehearsals."""
    here(tmp_path, monkeypatch)
    runs = tmp_path / "out" / RECIPE
    for name in ("rehearsal", "full-0", "uniform-0", "loss-0"):
        shutil.copytree(whole / "out" / RECIPE / name, runs / name, symlinks=True)
    for file in runs.rglob("fit.yaml"):
        file.write_text(file.read_text().replace(str(whole), str(tmp_path)))
    killed = subprocess.Popen([*COMMAND, *COMPARE], cwd=tmp_path)
    finished = []
    while len(finished) < 5:
        assert killed.poll() is None, "ended before it was killed"
        time.sleep(0.05)
        finished = [f for f in runs.glob("*-*/run.json") if json.loads(f.read_text())["finished"]]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert killed.returncode == -9
    assert not (tmp_path / "out/report.json").exists()
    before = {file: file.stat().st_mtime_ns for file in finished}
    again = subprocess.run([*COMMAND, *COMPARE], cwd=tmp_path, check=False)
    assert again.returncode == 1  # of the arm that breaks
    assert {file: file.stat().st_mtime_ns for file in finished} == before
    assert without_clocks(tmp_path) == without_clocks(whole)
    started = [len(list(f.glob("wandb/offline-run-*"))) for f in runs.iterdir() if f.name != "rehearsal"]
    assert started == [1] * 8  # a run that survived the kill was waited for, and not started again


def test_another_comparison_is_not_mixed_into_a_folder(whole, monkeypatch):
    monkeypatch.chdir(whole)
    with pytest.raises(SystemExit, match=r"Argument `--out` must be a new folder.*lr: 0.001 there, 0.002 here"):
        cli.main(["compare", *COMPARE, "--model.lr=0.002"])


def test_seconds_over_a_dask_cluster(tmp_path, monkeypatch):
    here(tmp_path, monkeypatch)
    options = [
        RECIPE,
        "--methods=full",
        "--seeds=1",
        "--budget=seconds",
        "--backend=dask",
        *SMALL,
        "--trainer.logger=false",
    ]
    # In a process of its own, since dask leaves variables in the environment.
    subprocess.run([*COMMAND, *options], cwd=tmp_path, check=True)
    (w,) = json.loads((tmp_path / "out/report.json").read_text())["workloads"]
    last = {run["arm"]: run["points"][-1] for run in w["runs"]}
    timing = json.loads((tmp_path / "out" / RECIPE / "timing/run.json").read_text())["points"][-1]
    assert (timing["step"], timing["seconds"]) == (24, w["budget"]["amount"])
    assert all(point["seconds"] >= w["budget"]["amount"] for point in last.values())
    assert all(point["step"] > 0 for point in last.values())  # as many as each has time for
    assert "one seed says nothing" in (tmp_path / "out/report.html").read_text()


# ---------------------------------------------------------------------- what is refused before an arm starts


def test_what_is_wrong_with_one_arm_is_found_before_any_starts(tmp_path, monkeypatch):
    """The table of irreducible losses is missing, which only a constructor can see."""
    here(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=r"(?s)nothing was started:.*arm 'reducible_loss': .*irreducible") as error:
        cli.main(["compare", RECIPE, "--methods=reducible_loss", "--jobs=2", "--seeds=1", "--metric=val_f1",
                  "--mode=max", *SMALL])  # fmt: skip
    assert "arm 'full': Argument `--metric` must be logged in validation, but 'val_f1' is not; there is" in str(
        error.value
    )
    assert "val_accuracy" in str(error.value)
    assert [f.name for f in (tmp_path / "out" / RECIPE).iterdir()] == ["rehearsal"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope"], "A recipe must be one of .*, or a file, but got 'nope'"),
        ([RECIPE, "--methods=los"], "Argument `--methods` must name reducible_loss, .*recipe, full, .*but got 'los'"),
        ([RECIPE, "--methods=broken.Absent"], "'broken.Absent' cannot be imported"),
        ([RECIPE, "--methods=os.path.join"], "must name callbacks or samplers, but 'os.path.join' is"),
        ([RECIPE, "--keep=1.5"], r"Argument `--keep` must be in \(0, 1\], but got 1.5"),
        ([RECIPE, "--seeds=0"], "Argument `--seeds` must be an integer >= 1, but got 0"),
        ([RECIPE, "--jobs=0"], "Argument `--jobs` must be an integer >= 1, but got 0"),
        ([RECIPE, "--budget=hours"], "Argument `--budget` must be steps, samples, epochs, flops.*but got 'hours'"),
        ([RECIPE, "--budget=steps=many"], "Argument `--budget` must be .*but got 'steps=many'"),
        ([RECIPE, "--budget=seconds", "--jobs=2"], "Argument `--jobs` must be at most 1 with a budget of seconds"),
        ([RECIPE, "--metric=f1"], "Argument `--mode` must be given: whether a 'f1' is better"),
        ([RECIPE, RECIPE], "Argument `recipes` must have different names"),
        ([RECIPE, "--backend=ray"], "Argument `--backend=ray` needs `pip install ray`"),
        ([RECIPE, "--budget=steps=0.2"], "Argument `--budget` must be .*but got 'steps=0.2'"),
        ([RECIPE, "--methods="], "Argument `--methods` must hold names of letters.*but got ''"),
        ([RECIPE, "--methods=../x"], r"Argument `--methods` must hold names of letters.*but got '\.\./x'"),
        ([RECIPE, "--target=nan"], "Argument `--target` must be a finite number, but got nan"),
        ([RECIPE, "--seed_everything=7"], "Argument `--seed_everything` must be left out"),
        ([RECIPE, "--trainer.fast_dev_run=true"], "Argument `--trainer.fast_dev_run` must be false"),
        ([RECIPE, "--trainer.max_stepz=3"], "max_stepz"),
        ([RECIPE, "--model.lr=fast"], "lr"),
        (["fashion_mnist_hard_batches", "--methods=loss"], "Argument `--keep` must be given"),
        (["sft_utility_diversity", "--methods=curation.samplers.hard_batches.HardBatchSampler", "--data=other.Data"],
         "other"),
    ],
)  # fmt: skip
def test_rubbish_is_refused_at_once(tmp_path, monkeypatch, args, message):
    here(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=f"(?s)^curation: .*{message}"):
        cli.main(["compare", *args])
    assert not (tmp_path / "runs").exists()


def test_a_recipe_without_a_selection_needs_methods(tmp_path, monkeypatch):
    here(tmp_path, monkeypatch)
    recipe = yaml.safe_load(find_recipe(RECIPE).read_text())
    del recipe["arms"]
    recipe["trainer"]["callbacks"] = None
    Path("plain.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(
        SystemExit, match=r"Argument `--methods` must be given: plain\.yaml has no selection of its own"
    ):
        cli.main(["compare", "plain.yaml"])


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (None, "'x' is None"),
        ("loss", "'x' is 'loss'"),
        ([1], r"'x' is \[1\]"),
        ({"callbacks": {"class_path": "a.B"}}, "'x' is {'callbacks'"),
        ({"callbacks": ["a.B"]}, "'x' is {'callbacks'"),
        ({"callbacks": [{"init_args": {}}]}, "'x' is {'callbacks'"),
        ({"callbacks": [{"class_path": "broken.Absent"}]}, "'broken.Absent' cannot be imported"),
        ({"callbacks": [{"class_path": "torch.nn.Identity"}]}, "arm 'x': .*Identity"),
        ({"callbacks": [{"class_path": "curation.callbacks.HardSampleSelection", "init_args": {"rule": "tp"}}]},
         "arm 'x': .*rule"),
        ({"model.lr": "fast"}, "arm 'x': .*lr"),
    ],
)  # fmt: skip
def test_a_bad_arm_is_named(tmp_path, monkeypatch, arm, message):
    here(tmp_path, monkeypatch)
    monkeypatch.setattr(rehearsal, "execute", lambda *_: pytest.fail("started"))
    recipe = yaml.safe_load(find_recipe(RECIPE).read_text())
    recipe["data"]["init_args"]["data"] = "digits"
    Path("mine.yaml").write_text(yaml.safe_dump({**recipe, "arms": {"x": arm}}))
    with pytest.raises(SystemExit, match=f"(?s)^curation: .*{message}"):
        cli.main(["compare", "mine.yaml"])


WORDS = {
    "Traceback (most recent call last):\n  x\nKeyError: 1\nsecond\n\nended with status 1\n": "KeyError: 1",
    "curation: Argument `lr` must be > 0.\n\nended with status 1\n": "curation: Argument `lr` must be > 0.",
    "a warning\n\nended with status 0\n": "ended with status 0, without an error message",
    "Traceback (most recent call last):\n  x\n\nkilled by signal 9\n": "killed by signal 9",
}


@pytest.mark.parametrize(("log", "words"), WORDS.items(), ids=range(len(WORDS)))
def test_the_last_words_of_a_run_say_why_it_ended(tmp_path, log, words):
    (tmp_path / "log.txt").write_text(log)
    assert Run("uniform", 0, tmp_path, {}).failure == words


def test_what_was_mended_is_tried_again_and_what_is_finished_is_kept(tmp_path):
    for config in ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}):
        resume.prepare(Run("uniform", 0, tmp_path, config))
        assert yaml.safe_load((tmp_path / "fit.yaml").read_text()) == config
    (tmp_path / "run.json").write_text('{"finished": true, "points": []}')
    with pytest.raises(ValueError, match=r"Argument `--out` must be a new folder.*a: b: 3 there, 4 here"):
        resume.prepare(Run("uniform", 0, tmp_path, {"a": [1, {"b": 4}]}))


# ---------------------------------------------------------------------- arms and lengths


def names(callbacks):
    return [c["class_path"].rpartition(".")[2] for c in callbacks]


def configured(args, name, seed=3, keep=None):
    recipe = arms.resolve(arms.with_seed(args, seed))
    arm = arms.make_arm(name, recipe, keep or 0.25)
    return arms.configure(args, arm, seed, keep, Path("out"), "group", {"max_steps": 5})


def test_an_arm_takes_the_place_of_the_recipes_selection():
    args = [f"--config={find_recipe('sft_utility_diversity')}", "--data.seed={seed}"]
    config = configured(args, "importance")
    assert names(config["trainer"]["callbacks"]) == ["ExactResume", "HardSampleSelection", "RunMeter"]
    selection = config["trainer"]["callbacks"][-2]["init_args"]
    assert selection == {"keep": 0.25, "rule": "importance", "score": "grad_norm", "seed": 3}
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 3
    full = configured(args, "full")["trainer"]["callbacks"][-2]
    assert full["init_args"]["keep"] == 1.0
    callbacks = configured(args, "recipe", keep=0.5)["trainer"]["callbacks"]
    assert names(callbacks) == ["ExactResume", "UtilityDiversitySelection", "RunMeter"]
    assert callbacks[-2]["init_args"]["keep"] == 0.5


def test_arms_of_a_recipe_say_what_the_baselines_are():
    args = [f"--config={find_recipe('fashion_mnist_hard_batches')}"]
    recipe = arms.resolve(args)
    words = arms.Arm("words", [], {"data.data": "digits", "data.sampler": None, "model.lr": 1})
    data = arms.configure(args, words, 0, None, Path("out"), "group", {})["data"]["init_args"]
    assert (data["data"], data["sampler"]) == ("digits", None)
    assert list(recipe["arms"]) == ["full", "uniform", "delta_0.8", "delta_0.5"]
    full, uniform, hard = (configured(args, name) for name in ("full", "uniform", "delta_0.5"))
    assert full["data"]["init_args"]["sampler"] is None
    assert names(full["trainer"]["callbacks"]) == ["RunMeter"]
    for config, delta in ((uniform, 1.0), (hard, 0.5)):
        assert config["data"]["init_args"]["sampler"]["init_args"] == {"delta": delta, "max_age": None, "seed": 3}
        assert names(config["trainer"]["callbacks"]) == ["HardBatchTraining", "RunMeter"]


def test_nothing_of_the_recipe_ends_a_run_or_stands_in_its_way(tmp_path):
    recipe = yaml.safe_load(find_recipe(RECIPE).read_text())
    more_callbacks = [
        "EarlyStopping",
        "Timer",
        "RichProgressBar",
        "OnExceptionCheckpoint",
        "LearningRateMonitor",
    ]
    arguments = {
        "Timer": {"interval": "step"},
        "EarlyStopping": {"monitor": "val_loss"},
        "OnExceptionCheckpoint": {"dirpath": "x"},
    }
    recipe["trainer"]["callbacks"] += [
        {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments.get(name, {})}
        for name in more_callbacks
    ]
    recipe["trainer"] |= {"max_time": "00:00:01:00", "min_epochs": 3, "min_steps": 50}
    recipe["trainer"]["logger"][-1]["init_args"] |= {"entity": "team", "offline": True, "tags": ["a"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    trainer = configured([f"--config={tmp_path / 'mine.yaml'}"], "loss")["trainer"]
    kept = ["ExactResume", "CorruptedShare", "LearningRateMonitor", "HardSampleSelection", "RunMeter"]
    assert names(trainer["callbacks"]) == kept
    assert [trainer[name] for name in ("max_time", "min_epochs", "min_steps")] == [None] * 3
    wandb = trainer["logger"][-1]["init_args"]
    assert (wandb["entity"], wandb["offline"], wandb["tags"], wandb["name"]) == ("team", True, ["a"], "loss-3")


def test_a_run_that_ends_before_its_budget_is_no_result(tmp_path):
    meter = {"init_args": {"max_steps": 10}}
    run = Run("uniform", 0, tmp_path, {"trainer": {"callbacks": [meter]}})
    options = command.parse([RECIPE])[0]
    w = Workload("w", tmp_path, [], {}, [arms.Arm("uniform")], None, "val_loss", "min", {"uniform": run}, [run])
    point = {"step": 7, "seconds": 1.0, "samples_trained": 1, "samples_scored": 0, "metrics": {"val_loss": 1.0}}
    result = {"points": [point], "finished": True, "steps": 7, "flops_per_step": 1.0}
    for changes, error in (
        ({}, "it ended before its budget was spent, after 7 steps"),
        ({"steps": 9}, "it ended without an evaluation of its last weights"),
        ({"points": [{**point, "step": 10}], "steps": 10}, None),
    ):
        (tmp_path / "run.json").write_text(json.dumps({**result, **changes}))
        assert collect(w, options)["runs"][0]["error"] == error


def test_a_metric_that_the_last_validation_did_not_log_is_no_result(tmp_path):
    """Nor is the value of an earlier validation, that of other weights."""
    run = Run("uniform", 0, tmp_path, {"trainer": {"callbacks": [{"init_args": {"max_steps": 10}}]}})
    options = command.parse([RECIPE])[0]
    w = Workload("w", tmp_path, [], {}, [arms.Arm("uniform")], None, "rare", "max", {"uniform": run}, [run])
    cost = {"seconds": 1.0, "samples_trained": 1, "samples_scored": 0}
    points = [{"step": step, **cost, "metrics": {"rare": 0.5} if step == 5 else {}} for step in (5, 10)]
    result = {"points": points, "finished": True, "steps": 10, "flops_per_step": 1.0}
    (tmp_path / "run.json").write_text(json.dumps(result))
    collected = collect(w, options)["runs"][0]
    assert collected["error"] == "its last validation did not log rare, so that of its last weights is not known"
    assert [(point["step"], point["value"]) for point in collected["points"]] == [(5, 0.5)]
    assert rehearsal.rehearsal_errors(w) == []  # an early validation has logged it


@pytest.mark.parametrize("name", ["run.json", "fit.yaml"])
def test_a_damaged_file_is_named(tmp_path, name):
    run = Run("uniform", 0, tmp_path, METERED)
    resume.prepare(run)
    whole = {"run.json": '{"finished": true, "points": [{"step', "fit.yaml": "trainer: {callbacks: ["}
    for text in (whole[name], b"\xff\xfe", *(["[]", "{}", '{"points": 1, "finished": 0}'] * (name == "run.json"))):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(
            ValueError, match=rf"(?s){name}' is damaged \(.*\)\. Delete .*the same command repeats the run"
        ):
            processes.execute([run], "runs", "threading", 1)


def test_a_second_budget_does_not_change_the_runs_of_the_first(tmp_path, monkeypatch):
    """Both have written `fit.yaml` before a run of either starts; or a run of the first is in progress."""
    first, second = (Run("uniform", 0, tmp_path, {**CPU, "steps": steps}) for steps in (16, 60))

    def fit(command, **_):
        steps = yaml.safe_load((tmp_path / "fit.yaml").read_text())["steps"]
        (tmp_path / "run.json").write_text(json.dumps({"finished": True, "points": [], "steps": steps}))
        with pytest.raises(ValueError, match=r"Argument `--out` must be a new folder.*steps: 16 there, 60 here"):
            resume.prepare(second)  # while the run holds its lock
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fit)
    resume.prepare(first)
    resume.prepare(second)
    processes.fit(first, ".", None)
    assert first.result["steps"] == 16
    for refused in (lambda: processes.fit(second, ".", None), lambda: resume.check_same(second)):
        with pytest.raises(ValueError, match=r"Argument `--out` must be a new folder.*steps: 16 there, 60 here"):
            refused()
    processes.fit(first, ".", None)  # the same comparison, started twice
    resume.check_same(first)


def test_a_full_disk_names_the_log(tmp_path, monkeypatch):
    run = Run("uniform", 0, tmp_path, CPU)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    resume.prepare(run)
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*log\.txt'"):
        processes.fit(run, ".", None)


def test_a_killed_worker_is_said_in_one_line(tmp_path, monkeypatch):
    killed = type("KilledWorker", (Exception,), {})  # as of dask

    def fit(*_):
        raise killed("task")

    monkeypatch.setattr(processes, "fit", fit)
    with pytest.raises(ValueError, match="a worker of `--backend=threading` was killed; the same command goes on"):
        processes.execute([Run("uniform", 0, tmp_path, METERED)], "runs", "threading", 1)


# ---------------------------------------------------------------------- what a recipe says

TAGGED = """
from lightning.pytorch.demos.boring_classes import BoringModel

class Tagged(BoringModel):
    def __init__(self, either: str | float = "a", text: str = "a", many: list[str | float] | None = None):
        super().__init__()
        self.given = [either, text, *(many or [])]
"""
BORING = {
    "model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"},
    "data": {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"},
    "trainer": {"accelerator": "cpu", "max_steps": 2, "limit_val_batches": 1, "enable_progress_bar": False,
                "enable_checkpointing": False, "enable_model_summary": False},
}  # fmt: skip


STRINGS = ["12e5", "1.5e3", "1_0e2", "1e+5", ".5", "1:30", "null", "true", "0x1F", "2020-01-01", "~"]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(STRINGS) | st.text("0123456789eE+-._:xn", max_size=8))
@example("12e5")
def test_a_string_stays_the_string_that_fit_gets(tagged, text):
    try:
        get_loader("yaml")(text)
    except (ValueError, TypeError, yaml.YAMLError):  # `._` is no number, `0:` no text, `:` no YAML to the parser
        assume(False)
    recipe, place = Path("recipe.yaml"), Path("fit.yaml")
    given = {"either": text, "text": text, "many": [text]}
    model = {"class_path": "tagged.Tagged", "init_args": given}
    recipe.write_text(json.dumps({**BORING, "model": model, "trainer": {**BORING["trainer"], "logger": False}}))
    config = arms.configure([f"--config={recipe}"], arms.Arm("recipe"), 0, None, Path("out"), "", {})
    override = arms.Arm("a", None, {f"model.{name}": value for name, value in given.items()})
    assert arms.configure([f"--config={recipe}"], override, 0, None, Path("out"), "", {}) == config
    place.write_text(yaml_text.dump(config))
    assert yaml.safe_load(place.read_text()) == config
    assert lightning_cli.run([f"--config={place}"], execute=False).model.given == [text] * 3


@pytest.fixture
def tagged(tmp_path, monkeypatch):
    (tmp_path / "tagged.py").write_text(TAGGED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("tagged", None)


def test_what_fit_writes_is_a_recipe_for_compare(tmp_path, monkeypatch):
    """With the optimizer of the command line, too; a checkpoint to go on from is refused."""
    monkeypatch.chdir(tmp_path)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.03}}
    recipe = {**BORING, "optimizer": optimizer, "trainer": {**BORING["trainer"], "logger": logger}}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    cli.main(["fit", "--config=mine.yaml"])
    (saved,) = Path("logs").glob("**/config.yaml")
    options, overrides = command.parse([str(saved), "--methods=loss", "--keep=0.5", "--metric=val_loss"])
    w = make_workload(str(saved), overrides, options)
    assert [arm.name for arm in w.arms] == ["full", "uniform", "loss"]
    config = w.configure(w.arms[-1], 0, tmp_path / "loss-0", "", max_steps=2)
    assert config["optimizer"]["init_args"]["lr"] == 0.03
    assert set(config) == {"seed_everything", "trainer", "model", "data", "optimizer"}
    made = lightning_cli.run([f"--config={saved}"], execute=False).model.configure_optimizers()
    assert (type(made).__name__, made.defaults["lr"]) == ("SGD", 0.03)
    Path("more.yaml").write_text(yaml.safe_dump({**recipe, "ckpt_path": "last"}))
    with pytest.raises(SystemExit, match=r"Argument `ckpt_path` must be null, .* but in more.yaml it is 'last'"):
        cli.main(["compare", "more.yaml", "--methods=loss", "--keep=0.5"])


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("val_loss", "min"), ("val/acc", "max"), ("val_accuracy/dataloader_idx_0", "max"), ("Val Loss", "min"),
     ("val/inaccuracy", None), ("val/accel_error", None), ("val/lossless_ratio", None), ("val/acc_loss", None),
     ("val/neg_loss", None), ("val_accuracy_drop", None), ("f1", None), ("", None)],
)  # fmt: skip
def test_only_a_name_that_says_it_is_taken_for_a_direction(metric, mode):
    assert mode_of_name(metric) == mode
    if mode is None and metric:
        with pytest.raises(ValueError, match=r"Argument `--mode` must be given: whether a .* is not known"):
            metric_and_mode([], metric, None)


def test_a_recipe_and_a_name_that_differ_need_a_mode():
    """`EarlyStopping(monitor="val_acc")` has the mode min by default."""
    monitors = [{"init_args": {"monitor": "val_acc", "mode": "min"}}]
    with pytest.raises(ValueError, match=r"`--mode` must be given: .*'val_acc' .* is said differently by the recipe"):
        metric_and_mode(monitors, None, None)
    assert metric_and_mode(monitors, None, "max") == ("val_acc", "max")
    assert metric_and_mode([{"init_args": {"monitor": "f1", "mode": "max"}}], None, None) == ("f1", "max")


def test_an_unknown_length_needs_an_amount(tmp_path, monkeypatch):
    here(tmp_path, monkeypatch)
    options = command.parse([RECIPE, "--methods=loss", "--out=out"])[0]
    w = make_workload(RECIPE, ["--data.data=digits"], options)
    for arm in w.arms:
        w.rehearsals[arm.name] = run = Run(arm.name, 0, tmp_path / arm.name, {})
        run.folder.mkdir()
        result = {"points": [{"step": 8, "samples_trained": 8}], "flops_per_step": 0.0, "total_steps": -1}
        (run.folder / "run.json").write_text(json.dumps({**result, "finished": True}))
    with pytest.raises(ValueError, match="Argument `--budget` must be an amount, such as steps=1000"):
        schedule(w, options)
    options.budget = ("flops", None)
    with pytest.raises(ValueError, match="Argument `--budget` must not be flops: torch counts none"):
        schedule(w, options)


def test_a_sampler_is_compared_by_its_class_path(tmp_path, monkeypatch):
    here(tmp_path, monkeypatch)
    Path("mine.py").write_text("from curation.samplers.hard_batches import HardBatchSampler as Base\n\n\n"
                               "class Mine(Base):\n    pass\n")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    config = configured([f"--config={find_recipe('sft_utility_diversity')}"], "mine.Mine")
    assert config["data"]["init_args"]["sampler"]["class_path"] == "mine.Mine"
    assert names(config["trainer"]["callbacks"]) == ["ExactResume", "RunMeter"]


REHEARSED = {  # samples and FLOPs of 8 steps
    "full": (2560, 900.0),
    "uniform": (256, 90.0),
    "loss": (256, 330.0),
}


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (("steps", None), {"full": 1000, "uniform": 1000, "loss": 1000}),
        (("steps", 50.0), {"full": 50, "uniform": 50, "loss": 50}),
        (("samples", None), {"full": 100, "uniform": 1000, "loss": 1000}),
        (("samples", 640.0), {"full": 2, "uniform": 20, "loss": 20}),
        (("flops", None), {"full": 100, "uniform": 1000, "loss": 273}),
    ],
)
def test_every_arm_spends_the_same(tmp_path, monkeypatch, budget, steps):
    here(tmp_path, monkeypatch)
    options = command.parse([RECIPE, "--methods=loss", "--out=out", "--seeds=2"])[0]
    options.budget = budget
    w = make_workload(RECIPE, ["--data.data=digits"], options)
    for name, (samples, flops) in REHEARSED.items():
        run = Run(name, 0, tmp_path / name, {})
        run.folder.mkdir()
        result = {"points": [{"step": 8, "samples_trained": samples}], "flops_per_step": flops, "total_steps": 1000,
                  "steps_per_epoch": 150}  # fmt: skip
        (run.folder / "run.json").write_text(json.dumps({**result, "finished": True, "seconds_per_step": 1.0}))
        w.rehearsals[name] = run
    schedule(w, options)
    trainers = {(run.arm, run.seed): run.config["trainer"] for run in w.runs}
    for (arm, _), config in trainers.items():
        assert config["max_steps"] == config["callbacks"][-1]["init_args"]["max_steps"] == steps[arm]
        assert config["val_check_interval"] == round(100 * steps[arm] / steps["uniform"])
    assert len(trainers) == 6


CPU = {"trainer": {"accelerator": "cpu", "devices": 1}}
METERED = {"trainer": {**CPU["trainer"], "callbacks": [{"init_args": {"max_steps": 10}}]}}


def test_a_run_in_progress_is_waited_for_and_not_repeated(tmp_path):
    run = Run("uniform", 0, tmp_path, CPU)
    resume.prepare(run)
    with resume.lock(tmp_path / "lock"):
        waiting = threading.Thread(target=processes.fit, args=(run, ".", None))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        (tmp_path / "run.json").write_text('{"finished": true, "points": []}')
    waiting.join(10)
    assert not waiting.is_alive()
    assert not (tmp_path / "log.txt").exists()


def test_a_gpu_has_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    taken = []

    def third():
        with processes.free_gpu(2) as gpu:
            taken.append(gpu.index)

    with processes.free_gpu(2) as first:
        with processes.free_gpu(2) as second:
            assert [first.index, second.index] == [0, 1]
            waiting = threading.Thread(target=third)
            waiting.start()
            waiting.join(0.5)
            assert not taken
        waiting.join(10)
        assert taken == [1]
    with processes.free_gpu(0) as none:
        assert none is None


def test_the_environment_of_a_fit_has_its_share_of_the_cores(tmp_path, monkeypatch):
    seen = {}

    def record(command, **kwargs):
        seen.update(kwargs["env"], command=command)
        return subprocess.CompletedProcess(command, -9)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the processes of some backends have it
    run = Run("uniform", 0, tmp_path, CPU)
    assert run.failure == "it was not run"
    processes.fit(run, ".", 3)
    assert seen["OMP_NUM_THREADS"] == "3"
    assert seen["command"][-3:] == ["fit", "--config", str(tmp_path / "fit.yaml")]
    assert run.failure == "killed by signal 9"
