"""What a fit costs is what it costs: steps, rows, FLOPs counted by hand, and evaluation off the clock."""

import json
import os
import time

import pytest
import torch
from helpers import CLASSES, FEATURES, Classifier, LanguageModel, loader, texts, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from stand_ins import EverySecond
from torch.utils.data import DataLoader, default_collate

from curation.callbacks import InstanceSelection, RunMeter, UniformSelection, UtilityDiversitySelection
from curation.callbacks.runs.flop_count import FlopCount

VALIDATION = {"ids": False, "shuffle": False, "n": 16}


def fit(tmp_path, *callbacks, module=None, meter=None, **kwargs):
    meter = {"path": str(tmp_path / "run.json"), **(meter or {})}
    run = trainer(RunMeter(**meter), *callbacks, **kwargs)
    run.fit(module or Classifier(), loader(), loader(**VALIDATION))
    return json.loads((tmp_path / "run.json").read_text())


def test_a_point_for_every_validation(tmp_path):
    content = fit(tmp_path, UniformSelection(keep=0.25))
    assert [(p["step"], p["samples_trained"], p["samples_scored"]) for p in content["points"]] == [
        (8, 16, 0),
        (16, 32, 0),
    ]
    assert all({"val_loss", "train_loss"} <= p["metrics"].keys() for p in content["points"])
    assert content["points"][0]["seconds"] < content["points"][1]["seconds"] < content["wall_seconds"]
    assert content["finished"]
    assert content["steps"] == 16
    assert content["peak_memory"] > 2**26


def test_candidates_that_were_scored_are_counted(tmp_path):
    content = fit(tmp_path, UtilityDiversitySelection(keep=0.25))
    assert [(p["samples_trained"], p["samples_scored"]) for p in content["points"]] == [(16, 64), (32, 128)]


@pytest.mark.parametrize("every", [1, 3])
def test_the_last_weights_are_evaluated_wherever_the_budget_ends(tmp_path, every):
    content = fit(tmp_path, meter={"max_steps": 11}, max_epochs=-1, check_val_every_n_epoch=every)
    assert [p["step"] for p in content["points"]] == [8, 11][every // 3 :]
    assert content["steps"] == 11
    assert content["points"][-1]["samples_trained"] == 88


def test_micro_batches_are_no_steps(tmp_path):
    content = fit(tmp_path, meter={"max_steps": 3}, max_epochs=-1, accumulate_grad_batches=2)
    assert [(p["step"], p["samples_trained"]) for p in content["points"]] == [(3, 48)]


def test_seconds_end_the_fit_and_evaluation_is_not_counted(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(Callback):
        def on_train_batch_start(self, *_):
            clock[0] += 1

        def on_validation_epoch_start(self, *_):
            clock[0] += 1000

    content = fit(tmp_path, Slow(), meter={"max_seconds": 11}, max_epochs=-1, num_sanity_val_steps=0)
    assert [(p["step"], p["seconds"]) for p in content["points"]] == [(8, 8), (11, 11)]
    assert content["wall_seconds"] == 2011


@pytest.mark.parametrize("last", [False, True])
def test_selecting_instances_is_on_the_clock_also_before_training_starts(tmp_path, monkeypatch, last):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(EverySecond):
        def fit(self, x, y):
            clock[0] += 100
            return super().fit(x, y)

    selection = InstanceSelection(selector=Slow(), every_n_epochs=1)
    before, after = ([], [selection]) if last else ([selection], [])
    run = trainer(*before, RunMeter(str(tmp_path / "run.json")), *after, max_epochs=2)
    run.fit(Classifier(), loader(ids=False), loader(**VALIDATION))
    content = json.loads((tmp_path / "run.json").read_text())
    assert [p["seconds"] for p in content["points"]] == [100, 200]


LAYERS = ((FEATURES, 16), (16, CLASSES))
FORWARD = 2 * sum(a * b for a, b in LAYERS)  # of one row
BACKWARD = 2 * FORWARD - 2 * FEATURES * 16  # nobody needs the gradient of the input


@pytest.mark.parametrize("epochs", [1, 2])
def test_flops_are_those_of_training_and_scoring_and_not_of_validation(tmp_path, epochs):
    count = {"count_flops": True}
    (tmp_path / "all").mkdir(), (tmp_path / "quarter").mkdir()
    whole = fit(tmp_path / "all", meter=count, max_epochs=epochs)
    assert whole["flops_per_step"] == 8 * (FORWARD + BACKWARD)
    assert whole["total_steps"] == 8 * epochs
    selection = UtilityDiversitySelection(keep=0.25, head="none")
    quarter = fit(tmp_path / "quarter", selection, meter=count, max_epochs=epochs)
    scoring = quarter["flops_per_step"] - 2 * (FORWARD + BACKWARD)
    assert scoring >= 8 * FORWARD  # and the products of the rule itself
    assert scoring < 10 * 8 * FORWARD


def test_attention_on_a_cpu_is_counted(tmp_path):
    """Twice the length: linear layers cost twice as much, attention four times; torch's counter leaves it out."""
    flops = []
    for width in (20, 40, 80):
        meter = RunMeter(str(tmp_path / "run.json"), count_flops=True)

        class Padded(LanguageModel):
            def training_step(self, batch, batch_idx):
                batch = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
                return super().training_step(batch, batch_idx)

            validation_step = training_step

        data = DataLoader(texts(8, pad_to=width), 8)
        trainer(meter, max_epochs=1).fit(Padded(), data, data)
        flops.append(json.loads((tmp_path / "run.json").read_text())["flops_per_step"])
    square = (flops[2] - 2 * flops[1]) - 2 * (flops[1] - 2 * flops[0])  # second differences see only T^2
    head_dim, heads, layers, batch = 8, 2, 2, 8
    of_a_product = batch * heads * layers * head_dim * 2  # a product over T^2 pairs
    products = 2 + 5  # forward; backward with the scores made again
    assert square == products * of_a_product * ((80**2 - 2 * 40**2) - 2 * (40**2 - 2 * 20**2))


GROUPS = [slice(0, 8), slice(8, 16), slice(16, 24)]
GROUPED = {
    "rows": ((24, 16), (3, 16, 8), lambda a, b, i: a[GROUPS[i]] @ b[i]),
    "columns": ((3, 8, 16), (16, 24), lambda a, b, i: a[i] @ b[:, GROUPS[i]]),
    "inner dimension": ((16, 24), (24, 8), lambda a, b, i: a[:, GROUPS[i]] @ b[GROUPS[i]]),
    "all": ((3, 8, 16), (3, 16, 24), lambda a, b, i: a[i] @ b[i]),
}


@pytest.mark.parametrize("kind", GROUPED)
def test_grouped_products_are_counted(kind):
    """As the products of their groups are."""
    left, right, product = GROUPED[kind]
    a, b = (torch.randn(shape, dtype=torch.bfloat16) for shape in (left, right))
    ends = None if kind == "all" else torch.tensor([group.stop for group in GROUPS], dtype=torch.int32)
    totals = []
    for work in (lambda: torch.ops.aten._grouped_mm(a, b, ends), lambda: [product(a, b, i) for i in range(3)]):
        count = FlopCount()
        count.start()
        try:
            work()
        finally:
            count.stop()
        totals.append(count.total)
    assert totals[0] == totals[1] > 0


def test_a_metric_of_earlier_weights_is_in_no_later_point(tmp_path):
    class Rare(Classifier):
        def on_validation_epoch_end(self):
            if self.current_epoch % 2 == 0:
                self.log("val/rare", float(self.global_step))

    points = fit(tmp_path, module=Rare(), max_epochs=4, num_sanity_val_steps=0)["points"]
    assert [point["metrics"].get("val/rare") for point in points] == [8, None, 24, None]
    assert all({"val_loss", "train_loss"} <= point["metrics"].keys() for point in points)


def test_a_step_that_failed_is_counted_when_it_is_repeated(tmp_path):
    class Fails(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 3 and self.fails:
                raise RuntimeError("stop")
            return loss

    def meter(fails, **resume):
        module, save = Fails(), ModelCheckpoint(tmp_path, "failed", save_on_exception=True)
        module.fails = fails
        run = trainer(
            RunMeter(tmp_path / "run.json", count_flops=True), save, max_epochs=1, enable_checkpointing=True
        )
        run.fit(module, loader(), loader(**VALIDATION), **resume)
        return json.loads((tmp_path / "run.json").read_text())

    with pytest.raises(RuntimeError, match="stop"):
        meter(True)
    content = meter(False, ckpt_path=next(tmp_path.glob("*.ckpt")))
    assert content["points"][-1]["samples_trained"] == 64
    assert content["flops_per_step"] == 8 * (FORWARD + BACKWARD)


def test_a_batch_that_was_left_out_is_not_counted(tmp_path):
    class LeavesOut(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    def collate(rows):
        return None if rows[0][-1]["sample_id"] == 0 else default_collate(rows)

    meter = RunMeter(tmp_path / "run.json")
    trainer(meter).fit(LeavesOut(), loader(collate_fn=collate, shuffle=False))
    assert meter.samples == 2 * 8  # the first batch of an epoch is None, the third is left out


class Sums(Classifier):
    """Trains on whatever its batches are."""

    def training_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        return self.net[0].weight.square().mean()


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda: CombinedLoader([DataLoader(range(30), 4), DataLoader(range(32), 4)], "min_size"), 28),
        (lambda: CombinedLoader([DataLoader(range(32), 4), DataLoader(range(64), 8)], "min_size"), 0),
        (lambda: DataLoader([{"text": "a"}] * 32, 4), 0),
    ],
    ids=["another last batch", "other batch sizes", "texts"],
)
def test_a_fit_whose_rows_cannot_be_counted_goes_on(tmp_path, make, rows):
    meter, module = RunMeter(tmp_path / "run.json"), Sums()
    with pytest.warns(UserWarning, match="RunMeter leaves batches out of `samples_trained` that it cannot count"):
        trainer(meter, max_epochs=1).fit(module, make())
    assert len(module.seen) == 8
    assert meter.samples == rows


def test_a_failed_fit_leaves_a_readable_file_that_is_not_finished(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, run, *_):
            if run.global_step == 12:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, Fails(), meter={"count_flops": True})
    content = json.loads((tmp_path / "run.json").read_text())
    assert [p["step"] for p in content["points"]] == [8]
    assert not content["finished"]
    assert torch._C._len_torch_dispatch_stack() == 0
    assert sorted(os.listdir(tmp_path)) == ["run.json"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_steps", 0, "must be an integer >= 1 or None, but got 0"),
        ("max_steps", 2.5, "must be an integer >= 1 or None, but got 2.5"),
        ("max_steps", True, "must be an integer >= 1 or None, but got True"),
        ("max_seconds", -1.0, r"must be in \(0, inf\) or None, but got -1.0"),
        ("max_seconds", float("nan"), r"must be in \(0, inf\) or None, but got nan"),
        ("max_seconds", True, r"must be in \(0, inf\) or None, but got True"),
        ("count_flops", 1, "must be True or False, but got 1"),
        ("path", 3, "must be a string, but got 3"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(name, value, message):
    with pytest.raises(ValueError, match=f"Argument `{name}` {message}"):
        RunMeter(**{"path": "run.json", name: value})
