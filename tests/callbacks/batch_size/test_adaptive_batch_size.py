"""Batch sizes by the noise of gradients."""

import csv
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from contract import test_contract
from contract.kinds import KINDS
from contract.registry import NO_SAMPLES, ONE_LOADER, SETS_THE_SIZE, Entry
from helpers import Accumulating, ManualAccumulating, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lines import ROWS, Line, ManualLine, SingleLine, assert_gradients_of_large_batches, fit, points
from processes import on_two_ranks
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

from curation.callbacks import AdaptiveBatchSize, ExactResume


def slow_moments(x, y, rows, weight, micro=ROWS):
    """Trace and squared norms from the gradients of micro-batches, one after another."""
    gradients = []
    for part in rows:
        residual = x[part] @ weight - y[part]
        gradients.append(2 * (residual[:, None] * x[part]).mean(0))
    mean = sum(gradients) / len(gradients)
    trace = micro / (len(gradients) - 1) * sum(float((g - mean).square().sum()) for g in gradients)
    square = float(mean.square().sum())
    return trace, square, square - trace / (micro * len(gradients))


def micro_batches(rows, size=ROWS):
    rows = [int(row) for row in rows]
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@pytest.mark.parametrize("line", [Line, ManualLine])
@pytest.mark.parametrize("size", [2, 5])
def test_the_moments_are_those_of_the_gradients_of_micro_batches(line, size):
    n = 20 * ROWS
    module, adaptive = line(), AdaptiveBatchSize(1e9, first=size * ROWS, every=1, decay=0.0)
    seen = []
    module.on_train_batch_end = lambda *_: seen.append(adaptive._moving.moments)
    fit(module, n, adaptive, epochs=1)
    x, y = points(n).tensors
    for i, (rows, weight, _) in enumerate(module.steps):
        moments = [float(value) for value in seen[size * (i + 1) - 1]]
        assert moments == pytest.approx(slow_moments(x, y, micro_batches(rows), weight), rel=1e-6)
        assert adaptive.noise_scales[i] == (
            i * size * ROWS + (size - 1) * ROWS,
            pytest.approx(moments[0] / moments[2] if moments[2] > 0 else float("inf")),
        )
    assert len(adaptive.noise_scales) == len(module.steps) == 20 // size
    assert adaptive.rows == size * ROWS


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 4), st.floats(0.05, 2), st.integers(1, 4), st.integers(9, 90), st.sampled_from(["none", "auto"])
)
def test_every_gradient_is_that_of_one_large_batch_and_the_size_never_shrinks(size, eta, every, n, couple):
    module = Line(1e-3)
    adaptive = AdaptiveBatchSize(eta, 6, size * ROWS, every, couple=couple)
    fit(module, n, adaptive, epochs=3)
    assert_gradients_of_large_batches(module, n)
    rows = [rows for _, rows in adaptive.sizes]
    assert rows == sorted(set(rows))
    assert rows[-1] <= 6 * size * ROWS


def test_the_size_is_what_the_norm_test_wants():
    n = 96 * ROWS
    module, adaptive = Line(), AdaptiveBatchSize(0.3, 1000, 2 * ROWS, every=1, decay=0.0)
    fit(module, n, adaptive, epochs=1, limit_train_batches=2)
    x, y = points(n).tensors
    rows, weight, _ = module.steps[0]
    trace, square, _ = slow_moments(x, y, micro_batches(rows), weight)
    assert adaptive.wanted(0) == max(2, -int(-trace / 0.09 / square // ROWS))
    assert adaptive.rows == adaptive.wanted(0) * ROWS > 2 * ROWS  # at the end of the epoch, where any size may begin


def test_a_short_batch_is_no_test():
    adaptive = AdaptiveBatchSize(first=2 * ROWS, every=1)
    fit(Line(), 5 * ROWS, adaptive, epochs=1)  # windows of 2, 2 and 1 batches
    assert len(adaptive.noise_scales) == 2
    fit(Line(), 4 * ROWS - 1, adaptive, epochs=1)  # 2 and 2, of which the last has 3 rows
    assert [samples for samples, _ in adaptive.noise_scales] == [ROWS, 3 * ROWS]
    assert len({noise for _, noise in adaptive.noise_scales}) == 1  # the average did not move


@pytest.mark.parametrize("scale", [None, 64.0, 2.0**40])
def test_a_scaler_does_not_change_the_estimate_and_its_overflow_is_none(scale):
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-34)
    plugin = MixedPrecision("bf16-mixed" if scaler is None else "16-mixed", "cpu", scaler)
    module, adaptive = SingleLine(), AdaptiveBatchSize(1e9, first=4 * ROWS, every=1, decay=0.0)
    fit(module, 16 * ROWS, adaptive, epochs=1, plugins=[plugin])
    x, y = points(16 * ROWS).tensors
    overflows = int(scale == 2.0**40)
    assert len(adaptive.noise_scales) == 4 - overflows
    rows, weight, _ = module.steps[-1]
    expected = slow_moments(x, y, micro_batches(rows), weight.double())
    assert [float(value) for value in adaptive._moving.moments] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("line", [Line, ManualLine])
@pytest.mark.parametrize("n", [40, 61])
def test_a_fit_goes_on_bit_for_bit(tmp_path, line, n):
    def run(ckpt_path=None, *callbacks):
        module, adaptive = line(), AdaptiveBatchSize(0.3, 8, 2 * ROWS, every=2, couple="sqrt")
        options = {"ckpt_path": ckpt_path, "enable_checkpointing": True, "epochs": 4}
        fit(module, n, adaptive, ExactResume(), *callbacks, **options)
        return module, adaptive

    whole, adaptive = run(None, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    assert len(adaptive.sizes) > 1
    for file in tmp_path.glob("*.ckpt"):
        resumed, again = run(file)
        assert torch.equal(whole.weight, resumed.weight)
        assert repr(adaptive.state_dict()) == repr(again.state_dict())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.floats(0.05, 0.5), st.integers(1, 90))
def test_schedules_of_the_rate_by_step_end_with_the_fit(size, eta, n):
    module = Line()

    def configure_optimizers():
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        steps = module.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)  # raises at one too many
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module.configure_optimizers = configure_optimizers
    run = fit(module, n, AdaptiveBatchSize(eta, 8, size * ROWS, 1), epochs=3)
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == scheduler.total_steps == 3 * math.ceil(math.ceil(n / ROWS) / size)


def test_a_schedule_by_every_second_step_is_refused():
    module = Line()

    def configure_optimizers():
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 2}]

    module.configure_optimizers = configure_optimizers
    with pytest.raises(ValueError, match="to have the frequency 1, but got 2"):
        fit(module, 40, AdaptiveBatchSize(first=2 * ROWS))


def test_every_logger_gets_both(tmp_path):
    logger = CSVLogger(tmp_path)
    adaptive = AdaptiveBatchSize(first=2 * ROWS, every=3)
    fit(Line(), 24 * ROWS, adaptive, epochs=1, logger=logger)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["curation/batch_size"]) == 2 * ROWS
    noise = [float(row["curation/gradient_noise_scale"]) for row in rows]
    assert noise[:4] == pytest.approx([adaptive.noise_scales[0][1]] * 3 + [adaptive.noise_scales[1][1]])


# ---------------------------------------------------------------------- what is refused


def test_one_micro_batch_a_step_is_refused():
    with pytest.raises(ValueError, match=r"Argument `first` must be two micro-batches or more, .* but got None"):
        fit(Line(), 40, AdaptiveBatchSize())


class TwoOptimizers(ManualLine):
    def configure_optimizers(self):
        return [super().configure_optimizers(), super().configure_optimizers()]


def test_two_optimizers_are_refused():
    with pytest.raises(TypeError, match="needs one optimizer, but got 2"):
        fit(TwoOptimizers(), 40, AdaptiveBatchSize(first=2 * ROWS))


def test_a_gradient_in_parts_is_refused():
    class Parts(Line):
        def training_step(self, batch, batch_idx):
            x, y = batch
            inner = checkpoint(lambda z: z * self.weight, x.requires_grad_(), use_reentrant=True)
            return (inner.sum(1) - y).square().mean() + self.weight.square().sum()

    with pytest.raises(RuntimeError, match="a weight got more parts than there were batches"):
        fit(Parts(), 40, AdaptiveBatchSize(first=2 * ROWS))


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_were_never_tried_are_refused(strategy):
    run = trainer(AdaptiveBatchSize())
    run._accelerator_connector.strategy = object.__new__(strategy)
    with pytest.raises(TypeError, match=f"does not support {strategy.__name__}"):
        AdaptiveBatchSize().setup(run, Line(), "fit")


# ---------------------------------------------------------------------- two processes


class ShardedLine(Line):
    """In a submodule, whose weight is divided between the ranks."""

    def __init__(self):
        super().__init__()
        start = self.weight.detach()
        del self.weight
        self.line = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
        self.line.weight.data.copy_(start[None])

    def configure_model(self):
        fully_shard(self.line, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.rows += y.tolist()
        return (self.line(x)[:, 0] - y).square().mean()

    def on_before_optimizer_step(self, optimizer):
        weight = self.line.weight
        self.steps.append((self.rows, *(t.full_tensor()[0].clone() for t in (weight.detach(), weight.grad))))
        self.rows = []


def main(folder):
    rank = int(os.environ["RANK"])
    for name, module, first in (("ddp", Line(), None), ("fsdp2", ShardedLine(), 4 * ROWS)):
        adaptive = AdaptiveBatchSize(0.3, first=first, every=1, decay=0.0)
        strategy = "ddp" if name == "ddp" else ModelParallelStrategy(2, 1)
        run = trainer(adaptive, devices=2, strategy=strategy, max_epochs=2, use_distributed_sampler=False)
        run.fit(module, DataLoader(Subset(points(80), list(range(40 * rank, 40 * rank + 40))), ROWS))
        torch.save((module.steps, adaptive.state_dict()), Path(folder, f"{name}-{rank}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(__file__, folder)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_ranks_estimate_from_the_micro_batches_of_both(ranks, name):
    (one, state), (other, same) = (torch.load(ranks / f"{name}-{rank}.pt") for rank in (0, 1))
    assert repr(state) == repr(same)
    x, y = points(80).tensors
    parts = [micro_batches(rows) for rows, *_ in (one[0], other[0])]
    compared, micro = [*parts[0], *parts[1]], ROWS
    if name == "fsdp2":  # of both ranks together
        compared, micro = [a + b for a, b in zip(*parts, strict=True)], 2 * ROWS
    trace, _, true = slow_moments(x, y, compared, one[0][1], micro)
    assert state["noise_scales"][0][1] == pytest.approx(trace / true if true > 0 else float("inf"))
    assert state["sizes"][0] == [0, (2 if name == "ddp" else 4) * ROWS]
    assert state["sizes"][-1][1] > state["sizes"][0][1]
    both = Line()
    both.steps = [(a + b, w, g) for (a, w, g), (b, *_) in zip(one, other, strict=True)]
    assert_gradients_of_large_batches(both, 80)


# ---------------------------------------------------------------------- every kind of run

ENTRY = Entry(
    AdaptiveBatchSize,
    {"first": 16, "every": 1, "eta": 1e-3, "growth": 2},
    refuses={**ONE_LOADER, **NO_SAMPLES, **SETS_THE_SIZE, "two_optimizers": "needs one optimizer, but got 2"},
    acted=lambda adaptive: len(adaptive.noise_scales) > 0,
    module=Accumulating,
    manual=ManualAccumulating,
)


@pytest.mark.parametrize("kind", KINDS)
def test_works_in_every_kind_of_run_or_says_why_not(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test_contract.test_works_in_every_kind_of_run_or_says_why_not(ENTRY, kind)


@pytest.mark.parametrize("fails", ["", "on_train_batch_end", "on_before_backward", "on_before_optimizer_step"])
def test_nothing_is_left_behind(fails):
    test_contract.test_nothing_is_left_behind(ENTRY, fails)


if __name__ == "__main__":
    main(sys.argv[1])
