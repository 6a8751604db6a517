"""A budget of epochs: arms that differ in steps, at equal samples."""

import json
import re

import pytest
from processes import fit_in_this_process

from curation.recipes import cli

RECIPE = "fashion_mnist_batch_size"
SHORT = ["--data.data=digits", "--trainer.max_epochs=4", "--metric=val_loss", "--seeds=1", "--jobs=1", "--out=out",
         "--trainer.logger=null"]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_in_this_process(monkeypatch)


def test_arms_of_a_batch_size_have_as_many_epochs_and_their_own_steps(here, tmp_path):
    cli.main(["compare", RECIPE, *SHORT, "--budget=epochs", "--methods=doubling,adaptive"])
    (w,) = json.loads((tmp_path / "out/report.json").read_text())["workloads"]
    assert w["budget"] == {"unit": "epochs", "amount": 4}
    last = {run["arm"]: run["points"][-1] for run in w["runs"]}
    assert list(last) == ["full", "uniform", "doubling", "adaptive"]
    assert len({point["samples_trained"] for point in last.values()}) == 1
    assert last["full"]["step"] > last["doubling"]["step"] > last["uniform"]["step"]
    flops = {run["arm"]: run["points"][-1]["step"] * run["flops_per_step"] for run in w["runs"]}
    assert flops["doubling"] == pytest.approx(flops["full"], rel=0.02)  # of samples, whatever the steps
    assert flops["adaptive"] == pytest.approx(flops["full"], rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--methods=doubling", "--budget-sweep=0.1,0.25,0.5,1"],
            "`--budget` must give every run of fashion_mnist_batch_size a whole number of epochs, such as epochs=8, "
            "but the runs would have 0.4, 1, 2, 4.",
        ),
        (["--methods=short"], "`--budget` must not be epochs with the arm 'short'"),
    ],
)
def test_budgets_that_are_no_epochs_are_refused(here, options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        cli.main(["compare", RECIPE, *SHORT, "--budget=epochs", *options])
