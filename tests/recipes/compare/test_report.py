"""What a report says follows from its runs."""

import html
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from curation.recipes import cli
from curation.recipes.compare import report
from curation.recipes.compare.summary import build, time_ratio
from curation.recipes.compare.verdict import number, verdict

RESULTS = Path(__file__).parents[3] / "docs" / "results"
REPORTS = [file for file in sorted(RESULTS.glob("*.json")) if "workloads" in file.read_text()[:20000]]


def run(arm, seed, values, error=None, seconds=1.0, flops=10.0):
    points = [
        {"step": 10 * i, "seconds": seconds * i, "samples_trained": 80 * i, "samples_scored": 0, "value": value}
        for i, value in enumerate(values, 1)
    ]
    cost = {"flops_per_step": flops, "wall_seconds": 36.0, "peak_memory": 2**20, "device": "CPU", "torch": "2"}
    return {"arm": arm, "seed": seed, "error": error, **cost, "points": points}


def workload(*runs, mode="min", target=None, name="a"):
    arms = list(dict.fromkeys(r["arm"] for r in runs))
    budget = {"unit": "steps", "amount": 30.0}
    return {"name": name, "metric": "val_loss", "mode": mode, "budget": budget, "target": target, "jobs": 1,
            "arms": arms, "runs": list(runs)}  # fmt: skip


UNIFORM = [run("uniform", 0, [5, 4, 3]), run("uniform", 1, [5, 4, 4]), run("uniform", 2, [5, 4, 5])]


def built(*runs, **kwargs):
    return build("curation compare a", [workload(*UNIFORM, *runs, **kwargs)])["workloads"][0]


def test_the_summary_by_hand():
    """Differences -1, -2, -3; uniform's best are 3, 4, 4, so it always reaches 4: in 2 seconds."""
    w = built(*(run("x", s, values, seconds=0.5) for s, values in enumerate([[9, 4, 2], [9, 5, 2], [9, 3, 2]])))
    summary = w["summary"]["x"]
    assert w["summary"]["target"] == 4
    assert summary["final"] == 2
    half = 4.302653 * 1 / math.sqrt(3)
    assert summary["difference"] == pytest.approx((-2, -2 - half, -2 + half), rel=1e-6)
    assert summary["time_to_target"] == 1.0  # of 1.0, 1.5 and 1.0
    assert time_ratio(w, "x") == 0.5  # uniform takes 2
    assert (summary["steps"], summary["samples_trained"], summary["seconds"], summary["flops"]) == (30, 240, 1.5, 300)
    assert w["summary"]["hours"] == pytest.approx(0.06)
    assert w["summary"]["uniform"]["difference"] is None


@pytest.mark.parametrize(
    ("mode", "finals", "kind", "sentence"),
    [
        ("min", [1, 2.1, 2.9], "won", r"x: won against uniform: val_loss -2\.00 \[-2\.25, -1\.75\], 3 paired seeds"),
        ("max", [1, 2.1, 2.9], "lost", r"x: lost against uniform: val_loss -2\.00 \[-2\.25, -1\.75\]"),
        ("min", [5, 6.1, 6.9], "lost", r"x: lost against uniform: val_loss \+2\.00 \[\+1\.75, \+2\.25\]"),
        ("max", [5, 6.1, 6.9], "won", "x: won against uniform"),
        ("min", [2, 4, 6], "even", r"x: no detectable difference to uniform in val_loss: \+0\.0 \[-2\.5, \+2\.5\]"),
    ],
)
def test_the_verdict_is_the_intervals(mode, finals, kind, sentence):
    w = built(*(run("x", s, [9, 9, value]) for s, value in enumerate(finals)), mode=mode)
    text = verdict(w, "x")
    assert text[0] == kind
    assert re.match(sentence, text[1])
    if kind == "even":
        assert "Time to 4: " in text[1]


@pytest.mark.parametrize("steps", [[1 / 256] * 3, [-0.5, -0.5, -0.5 + 1e-7], [0.0] * 3])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_equal_differences_are_no_victory(steps, mode, tmp_path):
    """One sample more in every seed, or differences of 32-bit numbers that are equal up to rounding."""
    runs = (run("x", s, [9, 9, UNIFORM[s]["points"][-1]["value"] + step]) for s, step in enumerate(steps))
    content = build("curation compare a", [workload(*UNIFORM, *runs, mode=mode)])
    kind, text = verdict(content["workloads"][0], "x")
    assert kind == "even"
    assert f"to uniform in val_loss: {steps[0]:+.4g} in each of 3 paired seeds, and equal differences say" in text
    report.write(content, tmp_path / "report")
    report.show(content, tmp_path / "report")
    assert "[-inf, +inf]" in (tmp_path / "report.html").read_text()
    assert "Infinity" not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize("name", ["val/$50_$100 loss", "val/acc[/b]", "val/acc[bold]", "a_{", "x:smile:", "<b>&"])
def test_names_are_shown_as_they_are(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    content = build("c", [{**workload(*UNIFORM, run("full", 0, [1]), name=name), "metric": name}])
    report.write(content, tmp_path / "report")
    report.show(content, tmp_path / "report")
    assert f"{name}: {name}" in capsys.readouterr().out
    assert html.escape(name, quote=False) in (tmp_path / "report.svg").read_text()
    assert html.escape(name) in (tmp_path / "report.html").read_text()


def test_a_report_on_a_full_disk_leaves_the_old_one(tmp_path):
    content = build("c", [workload(*UNIFORM)])
    report.write(content, tmp_path / "report")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    longer = build("c" * 999, [workload(*UNIFORM)])
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match=r"report\.json"):
            report.write(longer, tmp_path / "report")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_target_that_is_missed_is_missed():
    w = built(*(run("x", s, [9, 9, 9 if s else 1]) for s in range(3)), target=4.5)
    assert w["summary"]["x"]["time_to_target"] == math.inf
    assert "It does not reach 4.5 in most seeds" in verdict(w, "x")[1]
    nobody = built(*(run("x", s, [9, 9, 9]) for s in range(3)), target=1)
    assert math.isnan(time_ratio(nobody, "x"))
    assert "reach" not in verdict(nobody, "x")[1]
    alone = built(*(run("x", s, [9, 9, 1]) for s in range(3)), target=1)
    assert time_ratio(alone, "x") == 0
    assert "It reaches 1, uniform does not in most seeds" in verdict(alone, "x")[1]


def test_failed_and_diverged_runs_are_never_dropped_silently():
    w = built(run("x", 0, [9, 9, 2]), run("x", 1, [9], error="out of memory"), run("x", 2, [9, 9, math.nan]))
    summary = w["summary"]["x"]
    assert (summary["failed"], summary["diverged"], summary["pairs"]) == (1, 1, 1)
    kind, text = verdict(w, "x")
    assert kind == "failed"
    assert "no verdict, 1 of 3 runs of x failed, 1 of 3 runs of x diverged" in text
    assert summary["time_to_target"] == math.inf  # reached in one of three
    some = built(run("x", 0, [9, 9, 2]), run("x", 1, [9, 9, 2.9]), run("x", 2, [9], error="out of memory"))
    kind, text = verdict(some, "x")
    assert kind == "failed"
    assert "1 of 3 runs of x failed. val_loss 2.45, minus uniform -1.05" in text
    assert "over the 2 pairs that are left" in text


@pytest.mark.parametrize("lost", [1, 3])
def test_a_method_cannot_win_against_runs_that_failed(lost):
    base = [{**r, "error": "killed by signal 9"} if r["seed"] < lost else r for r in UNIFORM]
    w = workload(*base, *(run("x", s, [1, 1, 1]) for s in range(3)))
    (w,) = build("curation compare a", [w])["workloads"]
    kind, text = verdict(w, "x")
    assert kind == "failed"
    assert f"x: no verdict, {lost} of 3 runs of uniform failed" in text
    assert verdict(w, "uniform")[0] == "failed"


def test_nothing_that_ran_is_no_reason_to_fail(tmp_path):
    broken = [run(arm, 0, [], error="it was not run") for arm in ("full", "uniform", "x")]
    content = build("curation compare a", [workload(*broken)])
    report.write(content, tmp_path / "report")
    assert "uniform: no verdict, 1 of 1 runs of uniform failed" in (tmp_path / "report.html").read_text()


def test_one_page_needs_nothing_else_and_is_made_anew_from_its_json(tmp_path, capsys):
    equal = [{**r, "arm": arm} for arm in ("uniform", "x<b>") for r in UNIFORM]
    runs = [*UNIFORM, *({**r, "arm": "x<b>"} for r in UNIFORM), run("x<b>", 3, [1, 2, math.nan])]
    content = build("curation compare a b --methods='x<b>'", [workload(*runs), workload(*equal, name="b")])
    report.write(content, tmp_path / "report")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "x<b>" not in page
    assert "performance profile" in page
    kinds = ("json", "html", "png", "svg")
    first = {kind: (tmp_path / f"report.{kind}").read_bytes() for kind in kinds}
    json.loads(first["json"], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for kind in kinds[1:]:
        (tmp_path / f"report.{kind}").unlink()
    cli.main(["report", str(tmp_path / "report.json")])
    assert {kind: (tmp_path / f"report.{kind}").read_bytes() for kind in kinds} == first
    assert "no detectable difference" in capsys.readouterr().out


def test_a_dot_in_the_name_is_part_of_it(tmp_path):
    report.write(build("curation compare a", [workload(*UNIFORM)]), tmp_path / "my.v1")
    (tmp_path / "my.json").write_text("another")
    cli.main(["report", str(tmp_path / "my.v1.json")])
    assert (tmp_path / "my.json").read_text() == "another"
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "my.json",
        *(f"my.v1.{k}" for k in ("html", "json", "png", "svg")),
    ]


NO_POINTS = json.dumps({"command": "x", "workloads": [workload({**UNIFORM[0], "points": []})]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"command": "x"}',
        '{"command": "x", "workloads": []}',
        '{"command": "x", "workloads": [{}]}',
        NO_POINTS,
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SystemExit, match=r"curation: '.*x\.json' is not the report of a comparison"):
        cli.main(["report", str(tmp_path / "x.json")])


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_published_results_are_what_their_json_says(file, tmp_path):
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    cli.main(["report", str(copy)])
    for kind in ("json", "html"):
        assert copy.with_suffix(f".{kind}").read_text() == file.with_suffix(f".{kind}").read_text()


def test_there_are_published_results():
    assert len(REPORTS) >= 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.1235"), (12345, "12.35 k"), (1234, "1234"), (2.5e12, "2.5 T"), (math.inf, "never"),
     (math.nan, "-"), (0.0, "0"), (-3e6, "-3 M")],
)  # fmt: skip
def test_numbers_are_read_at_a_glance(value, text):
    assert number(value) == text


def test_the_wandb_run_lies_beside_the_report_though_the_service_works_in_another_folder(tmp_path):
    shutil.copy(REPORTS[0].with_suffix(".png"), tmp_path / "report.png")
    (tmp_path / "report.html").write_text("<p>")
    code = f"""
import os, pathlib, wandb
from curation.recipes.compare import report
wandb.setup()
os.chdir({str(tmp_path)!r})
report.log_to_wandb({{"workloads": []}}, pathlib.Path("report"), None, "group")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
