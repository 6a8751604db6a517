"""The demo is a comparison whose figures come from its runs."""

import json

from processes import fit_in_this_process

from curation.recipes.cli import demo


def test_the_demo_says_at_what_cost_pruning_reaches_the_quality_of_all_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fit_in_this_process(monkeypatch)  # tests/recipes/compare has them in processes of their own
    monkeypatch.setattr(
        demo, "SWEEP", ["--budget-sweep=0.5,1", "--sweep-arms=full,proportional", "--methods=proportional"]
    )
    monkeypatch.setattr(
        demo, "OPTIONS", [*demo.OPTIONS, "--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=2"]
    )
    demo.main(["--out", str(tmp_path / "demo"), "--seeds=2"])
    (workload,) = json.loads((tmp_path / "demo/report.json").read_text())["workloads"]
    assert workload["arms"] == ["full", "uniform", "proportional"]
    assert {run["arm"] for run in workload["runs"] if run["error"] is None} == {"full", "uniform", "proportional"}
    assert "proportional" in workload["cost_ratio"]
    assert "proportional" in capsys.readouterr().out
    assert (tmp_path / "demo/report.png").stat().st_size > 10_000
