"""Batch sizes by schedule: every step's gradient is that of one large batch."""

import csv
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import Classifier, ManualClassifier, data, loader, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lines import ROWS, Line, ManualLine, SingleLine, assert_gradients_of_large_batches, fit, points
from mixture import Mixture, Tokens, error, slow_gradients
from processes import on_two_ranks
from torch.utils.data import DataLoader, IterableDataset

from curation.callbacks import (
    AdaptiveBatchSize,
    BatchSizeScheduler,
    ConceptCoverageMonitor,
    DynamicDataPruning,
    ExactResume,
    GlobalBatchLoadBalancing,
    TrainingDynamics,
    UniformSelection,
    WeightedLoss,
)
from curation.samplers import DynamicDataPruningSampler

GROW = pytest.mark.parametrize("grow", ["accumulation", "loader"])
changes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7)), max_size=6)


def pairs_of(start, changes):
    pairs = [(0, start * ROWS)]
    for wait, size in changes:
        pairs.append((pairs[-1][0] + wait * ROWS // 2 + 1, size * ROWS))
    return pairs


@GROW
@pytest.mark.parametrize("line", [Line, ManualLine])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), changes, st.integers(1, 70))
def test_every_gradient_is_that_of_one_large_batch(line, grow, start, changes, n):
    module = line()
    fit(module, n, BatchSizeScheduler(pairs_of(start, changes), grow=grow))
    assert sum(len(rows) for rows, *_ in module.steps) == 2 * n
    assert_gradients_of_large_batches(module, n)


@pytest.mark.parametrize("batch", range(1, 13))
def test_sizes_may_change_at_every_batch(batch):
    for size in (1, 2, 3, 5, 8):
        for start in (1, 2, 4):
            module = Line()
            scheduler = BatchSizeScheduler([(0, start * ROWS), (batch * ROWS, size * ROWS)])
            fit(module, 13 * ROWS - 1, scheduler)
            assert_gradients_of_large_batches(module, 13 * ROWS - 1)
            assert scheduler.sizes[-1][1] == size * ROWS


class Calls(Line):
    """Remembers the rows of every call of its step."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def training_step(self, batch, batch_idx):
        self.calls.append((len(batch[1]), batch_idx))
        return super().training_step(batch, batch_idx)


def test_joined_batches_take_one_training_step():
    accumulated, joined, sizes = Calls(), Calls(), [(0, ROWS), (2 * ROWS, 3 * ROWS)]
    runs = [
        fit(module, 9 * ROWS - 1, BatchSizeScheduler(sizes, grow=grow), epochs=1)
        for module, grow in ((accumulated, "accumulation"), (joined, "loader"))
    ]
    assert joined.calls == [(4, 0), (4, 1), (4, 2), (12, 5), (11, 8)]
    assert [rows for rows, _ in accumulated.calls] == [4] * 8 + [3]
    assert runs[0].global_step == runs[1].global_step == 5
    assert [rows for rows, *_ in joined.steps] == [rows for rows, *_ in accumulated.steps]
    torch.testing.assert_close(joined.weight, accumulated.weight)
    assert "training_step" not in vars(runs[1].strategy)


def test_joined_texts_are_padded_to_the_longest():
    class Widths(Line):
        def training_step(self, batch, batch_idx):
            widths.append(tuple(batch["input_ids"].shape))
            return self.weight.sum()

    def texts(lengths):
        tokens = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        return {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": tokens}

    widths = []
    run = trainer(BatchSizeScheduler([(0, 2), (2, 4)], batch_size=2, grow="loader"), max_epochs=1)
    run.fit(Widths(), DataLoader([texts([2, 3]), texts([5, 1]), texts([1, 4]), texts([2, 2])], batch_size=None))
    assert widths == [(2, 3), (2, 5), (4, 4)]


@pytest.mark.parametrize(
    "other",
    [
        UniformSelection(keep=0.5),
        GlobalBatchLoadBalancing(),
        WeightedLoss("weight"),
        TrainingDynamics("x"),
        ConceptCoverageMonitor(losses=True),
    ],
)
def test_what_needs_a_step_for_every_batch_is_refused_beside_joined_batches(other):
    name = type(other).__name__
    with pytest.raises(TypeError, match=f"{name} needs a training step for every batch: set `grow='accumulation'`"):
        fit(Line(), 8 * ROWS, other, BatchSizeScheduler([(0, 2 * ROWS)], grow="loader"))


class Naive(Callback):
    """Changes the number at once, as is proposed elsewhere."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.accumulate_grad_batches = 2 if batch_idx < 1 else 3


def test_a_change_in_the_middle_of_a_window_has_other_gradients():
    module = Line()
    fit(module, 9 * ROWS, Naive(), epochs=1, accumulate_grad_batches=2)
    with pytest.raises(AssertionError):
        assert_gradients_of_large_batches(module, 9 * ROWS)


def test_lightning_alone_divides_a_short_window_by_its_whole_size():
    module = Line()
    fit(module, 5 * ROWS, epochs=1, accumulate_grad_batches=2)
    with pytest.raises(AssertionError):
        assert_gradients_of_large_batches(module, 5 * ROWS)


def test_a_constant_schedule_of_whole_windows_is_bit_for_bit_that_of_lightning():
    ours, theirs = Line(), Line()
    fit(ours, 12 * ROWS, BatchSizeScheduler([(0, 3 * ROWS)]))
    fit(theirs, 12 * ROWS, accumulate_grad_batches=3)
    assert torch.equal(ours.weight, theirs.weight)


# ---------------------------------------------------------------------- sizes and steps


@pytest.mark.parametrize("schedule", ["ramp", "doubling"])
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.sampled_from([2, 4, 8]), st.integers(1, 90), st.sampled_from([0.3, 0.5, 1.0]))
def test_the_estimate_of_steps_is_what_the_fit_takes(schedule, first, growth, n, over):
    module, estimates = Line(), []
    module.configure_optimizers = lambda: (
        estimates.append(module.trainer.estimated_stepping_batches),
        Line.configure_optimizers(module),
    )[1]
    run = fit(module, n, BatchSizeScheduler(schedule, growth, first * ROWS, over), epochs=3)
    assert estimates == [run.global_step] == [len(module.steps)]


def test_a_ramp_goes_from_what_the_trainer_accumulates_to_four_times_that_in_half_of_the_fit():
    scheduler = BatchSizeScheduler()
    fit(Line(), 48 * ROWS, scheduler, epochs=1, accumulate_grad_batches=2)
    assert scheduler.sizes == [(0, 8), (32, 16), (80, 20), (120, 24), (168, 28), (192, 32)]


def test_doubling_is_at_equal_distances():
    scheduler = BatchSizeScheduler("doubling", first=ROWS, over=1.0)
    fit(Line(), 16 * ROWS, scheduler)
    assert scheduler.sizes == [(0, ROWS), (16 * ROWS, 2 * ROWS), (32 * ROWS, 4 * ROWS)]


@pytest.mark.parametrize("limits", [{"epochs": -1}, {"epochs": 9}])
def test_a_schedule_stretches_over_a_fit_that_ends_by_steps(limits):
    module, scheduler = Line(), BatchSizeScheduler("doubling", first=ROWS)
    run = fit(module, 10 * ROWS, scheduler, max_steps=20, **limits)
    assert run.global_step == 20
    samples = sum(len(rows) for rows, *_ in module.steps)
    assert scheduler.sizes[-1][1] == 4 * ROWS
    assert scheduler.sizes[-1][0] == pytest.approx(samples / 2, abs=4 * ROWS)
    assert_gradients_of_large_batches(module, 10 * ROWS)


class Endless(IterableDataset):
    """Has no length, and ends."""

    def __init__(self, n):
        self.points = points(n)

    def __iter__(self):
        return (self.points[i] for i in range(len(self.points)))


@pytest.mark.parametrize("n", [13 * ROWS - 1, 100 * ROWS])
def test_a_loader_without_a_length(n):
    module, scheduler = Line(), BatchSizeScheduler("ramp", 3, 2 * ROWS)
    run = trainer(scheduler, max_steps=12, max_epochs=-1)
    run.fit(module, DataLoader(Endless(n), ROWS))
    assert run.global_step == len(module.steps) == 12
    assert_gradients_of_large_batches(module, n)
    assert len(scheduler.sizes) > 1


@GROW
def test_the_trainer_is_left_as_it_was(grow):
    for fails in (False, True):
        module = Line()
        if fails:
            module.on_train_batch_end = lambda *_: 1 / 0
        run = trainer(BatchSizeScheduler([(0, 3 * ROWS)], grow=grow), accumulate_grad_batches=2)
        cls = type(run)
        try:
            run.fit(module, DataLoader(points(40), ROWS))
        except ZeroDivisionError:
            assert fails
        assert (type(run), run.accumulate_grad_batches) == (cls, 2)
        assert "training_step" not in vars(run.strategy)


# ---------------------------------------------------------------------- learning rates


class Rates(Callback):
    """The rates of the steps, and what monitors see after them."""

    def __init__(self):
        self.inside, self.outside = [], []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda o, *_: self.inside.append(o.param_groups[0]["lr"]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outside.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("couple", "optimizer", "exponent"),
    [
        ("none", torch.optim.SGD, 0),
        ("auto", torch.optim.SGD, 1),
        ("auto", torch.optim.AdamW, 0.5),
        ("sqrt", torch.optim.SGD, 0.5),
        ("linear", torch.optim.AdamW, 1),
    ],
)
def test_the_rate_follows_the_size_up_to_the_rate_of_the_optimizer(couple, optimizer, exponent):
    module, rates = Line(), Rates()
    module.configure_optimizers = lambda: optimizer(module.parameters(), lr=0.01)
    fit(module, 16 * ROWS, BatchSizeScheduler("doubling", 4, ROWS, couple=couple), rates)
    sizes = [len(rows) for rows, *_ in module.steps]
    assert {ROWS, 2 * ROWS, 4 * ROWS} == set(sizes)
    assert rates.inside == pytest.approx([0.01 * (size / (4 * ROWS)) ** exponent for size in sizes])
    assert set(rates.outside) == {0.01}


def scheduled(scheduler, module):
    module.configure_optimizers = lambda: {
        "optimizer": (optimizer := torch.optim.SGD(module.parameters(), lr=1e-3)),
        "lr_scheduler": {"scheduler": scheduler(optimizer, module.trainer), "interval": "step"},
    }
    return module


def one_cycle(optimizer, trainer):
    """Raises an error at a step too many."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=trainer.estimated_stepping_batches)


@pytest.mark.parametrize("schedule", ["ramp", "doubling", "seesaw"])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 90), st.sampled_from(["steps", "samples"]))
def test_schedules_of_the_rate_end_with_the_fit(schedule, first, n, pace):
    module = scheduled(one_cycle, Line())
    run = fit(module, n, BatchSizeScheduler(schedule, 4, first * ROWS, pace=pace), epochs=3)
    config = run.lr_scheduler_configs[0].scheduler
    assert config.last_epoch == config.total_steps
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(config.get_last_lr()[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), changes, st.integers(1, 90))
def test_by_samples_the_rate_is_that_of_a_fit_with_steps_of_the_first_size(first, changes, n):
    pairs = [(samples, max(rows, first * ROWS)) for samples, rows in pairs_of(first, changes)]
    inside = []
    for callback in (BatchSizeScheduler(pairs, pace="samples"), BatchSizeScheduler(pairs[:1])):
        rates = Rates()
        module = scheduled(one_cycle, Line())
        fit(module, n, callback, rates)
        epoch = -(-n // ROWS)
        begins = [0]
        for rows, *_ in module.steps:
            begins.append(begins[-1] + -(-len(rows) // ROWS))
        assert begins.pop() == 2 * epoch
        inside.append(dict(zip(begins, rates.inside, strict=True)))
    grown, fixed = inside
    both = grown.keys() & fixed.keys()
    assert [grown[at] for at in both] == pytest.approx([fixed[at] for at in both])


def test_seesaw_divides_by_the_square_root_of_two_where_a_cosine_has_halved():
    def cosine(optimizer, trainer):
        total = trainer.estimated_stepping_batches
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / total)))

    module, rates = scheduled(cosine, Line()), Rates()
    fit(module, 60 * ROWS, BatchSizeScheduler("seesaw", 4, ROWS), rates, epochs=1)
    seen = 0
    for rate, (rows, *_) in zip(rates.inside, module.steps, strict=True):
        decay = 0.5 * (1 + math.cos(math.pi * seen / (60 * ROWS)))
        assert rate == pytest.approx(1e-3 * decay * (len(rows) / ROWS) ** 0.5)
        target = ROWS * (1 if decay > 0.5 + 1e-9 else 2 if decay > 0.25 + 1e-9 else 4)
        assert len(rows) == target or seen % target  # where it cannot begin yet
        seen += len(rows)
    assert {len(rows) for rows, *_ in module.steps} == {ROWS, 2 * ROWS, 4 * ROWS}


def test_two_callbacks_that_scale_the_rate_both_count_and_leave_it():
    rates, dataset = Rates(), data()
    pruning = DynamicDataPruning(lr_scale=1.0)
    batches = DataLoader(dataset, 8, sampler=DynamicDataPruningSampler(dataset, 8, rule="random"))
    trainer(pruning, BatchSizeScheduler([(0, 8), (128, 16)], couple="linear"), rates, max_epochs=4).fit(
        Classifier(), batches
    )
    assert set(rates.outside) == {0.1}
    assert rates.inside[0] == pytest.approx(0.05)  # half of the last size
    assert max(rates.inside) > 0.15


# ---------------------------------------------------------------------- resume


@GROW
@pytest.mark.parametrize("line", [Line, ManualLine])
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), changes, st.integers(9, 60))
def test_a_fit_goes_on_in_the_middle_of_a_ramp_bit_for_bit(tmp_path_factory, line, grow, start, changes, n):
    folder, pairs = tmp_path_factory.mktemp("ramp"), pairs_of(start, changes)

    def run(ckpt_path=None, *callbacks):
        module, scheduler = line(), BatchSizeScheduler(pairs, couple="linear", grow=grow)
        fit(module, n, scheduler, ExactResume(), *callbacks, ckpt_path=ckpt_path, enable_checkpointing=True)
        return module, scheduler

    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, scheduler = run(None, save)
    for file in folder.glob("*.ckpt"):
        resumed, again = run(file)
        assert torch.equal(whole.weight, resumed.weight)
        assert repr(scheduler.state_dict()) == repr(again.state_dict())
        assert [rows for rows, *_ in whole.steps[len(whole.steps) - len(resumed.steps) :]] == [
            rows for rows, *_ in resumed.steps
        ]


def test_a_checkpoint_without_the_callback_begins_with_a_size_that_fits(tmp_path):
    module = Line()
    run = fit(module, 12 * ROWS, ExactResume(), max_steps=3)
    run.save_checkpoint(tmp_path / "three.ckpt")
    module, scheduler = Line(), BatchSizeScheduler([(0, 2 * ROWS)])
    fit(module, 12 * ROWS, ExactResume(), scheduler, ckpt_path=tmp_path / "three.ckpt")
    assert [len(rows) for rows, *_ in module.steps][:3] == [ROWS, 2 * ROWS, 2 * ROWS]
    assert_gradients_of_large_batches(module, 12 * ROWS)


# ---------------------------------------------------------------------- kinds of runs


def test_gradients_are_clipped_after_they_are_divided():
    whole, clipped = Line(), Line()
    pairs = [(0, ROWS), (2 * ROWS, 3 * ROWS)]
    norms = []
    clipped.optimizer_step = lambda *args, **kwargs: (
        Line.optimizer_step(clipped, *args, **kwargs),
        norms.append(float(clipped.weight.grad.norm())),
    )[0]
    fit(clipped, 11 * ROWS - 2, BatchSizeScheduler(pairs), gradient_clip_val=0.5)
    assert_gradients_of_large_batches(clipped, 11 * ROWS - 2)
    assert norms == pytest.approx([min(0.5, float(g.norm())) for *_, g in clipped.steps])
    fit(whole, 11 * ROWS - 2, BatchSizeScheduler(pairs))
    assert not torch.equal(whole.weight, clipped.weight)


@GROW
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_with_a_scaler(precision, grow):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if precision == "16-mixed" else None
    module = SingleLine()
    plugins = [MixedPrecision(precision, "cpu", scaler)]
    fit(module, 11 * ROWS - 2, BatchSizeScheduler([(0, ROWS), (2 * ROWS, 3 * ROWS)], grow=grow), plugins=plugins)
    assert len(module.steps) == 10
    x, y = points(11 * ROWS - 2).tensors
    for rows, weight, gradient in module.steps:
        chosen = torch.isin(y, torch.tensor(rows, dtype=y.dtype))
        expected = 2 * ((x[chosen] @ weight.double() - y[chosen])[:, None] * x[chosen]).mean(0)
        assert (
            float((gradient - expected).norm() / expected.norm()) < 0.02
        )  # without the division off by half and more


@pytest.mark.parametrize("rule", ["running", "warm", "deferred", "prepass"])
def test_load_balancing_beside_it_is_that_of_the_whole_window(rule):
    module = Mixture(lr=0.0)
    scheduler = BatchSizeScheduler([(0, 4), (8, 8)])
    run = trainer(GlobalBatchLoadBalancing(2.0, estimator=rule), scheduler, max_epochs=1)
    run.fit(module, DataLoader(Tokens(22, 2), 2))
    batches, at = Tokens(22, 2).batches(2), 0
    windows = [batches[0:2], batches[2:4], batches[4:8], batches[8:]]
    assert len(module.gradients) == len(windows)
    for i, (gradients, window) in enumerate(zip(module.gradients, windows, strict=True)):
        if rule != "warm" or i == 0:  # warm has a memory, which its own tests check
            assert error(gradients, slow_gradients(module, [window], 2.0, rule)) < 1e-6
        at += len(window)


def test_load_balancing_after_it_is_refused():
    run = trainer(BatchSizeScheduler(), GlobalBatchLoadBalancing())
    with pytest.raises(ValueError, match="put BatchSizeScheduler after GlobalBatchLoadBalancing"):
        run.fit(Mixture(), DataLoader(Tokens(8, 2), 2))


def test_a_selection_beside_it_trains_on_the_mean_over_the_kept_rows():
    class Kept(Line):
        """Ids have been taken out of the batch."""

    module, n = Kept(), 11 * 8
    scheduler = BatchSizeScheduler([(0, 8), (16, 24)])
    run = trainer(UniformSelection(keep=0.5), scheduler, max_epochs=2)
    run.fit(module, DataLoader(points(n), 8))
    assert [len(rows) for rows, *_ in module.steps][:4] == [4, 4, 4, 12]
    assert_gradients_of_large_batches(module, n)


@pytest.mark.parametrize("skipped", [1, 4])
def test_a_batch_that_the_step_skips_does_not_count(skipped):
    class Skips(Line):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    module = Skips()
    fit(module, 6 * ROWS, BatchSizeScheduler([(0, 3 * ROWS)]), epochs=1)
    assert [len(rows) for rows, *_ in module.steps] == [
        2 * ROWS if skipped == 1 else 3 * ROWS,
        3 * ROWS if skipped == 1 else 2 * ROWS,
    ]
    assert_gradients_of_large_batches(module, 6 * ROWS)


def test_every_logger_gets_the_size(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Line(), 12 * ROWS, BatchSizeScheduler([(0, ROWS), (4 * ROWS, 2 * ROWS)]), epochs=1, logger=logger)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        sizes = [float(row["curation/batch_size"]) for row in csv.DictReader(file)]
    assert sizes == [4.0] * 4 + [8.0] * 4


# ---------------------------------------------------------------------- what is refused


class Loads(Line):
    batch_size = ROWS

    def train_dataloader(self):
        return DataLoader(points(8 * ROWS), self.batch_size)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: GradientAccumulationScheduler({1: 2}), "GradientAccumulationScheduler"),
        (lambda: BatchSizeFinder(), "BatchSizeFinder"),
        (lambda: AdaptiveBatchSize(), "AdaptiveBatchSize"),
    ],
)
def test_what_sets_the_batch_size_too_is_refused(other, name):
    with pytest.raises(ValueError, match=f"BatchSizeScheduler sets the batch size, and so would {name}"):
        trainer(BatchSizeScheduler(), other()).fit(Loads())


@pytest.mark.parametrize(
    ("scheduler", "argument"),
    [
        (lambda: BatchSizeScheduler(first=6), "`first` must be a multiple of the 4 rows .* but got 6"),
        (lambda: BatchSizeScheduler([(0, 4), (9, 10)]), "`schedule` must be a multiple of the 4 rows .* but got 10"),
    ],
)
def test_sizes_that_no_accumulation_gives_are_refused(scheduler, argument):
    module = Line()
    with pytest.raises(ValueError, match=f"Argument {argument}"):
        fit(module, 8 * ROWS, scheduler())
    assert module.steps == []


@pytest.mark.parametrize(
    "schedule",
    [[], [(4, 8)], [(0, 8), (8, 4), (8, 8)], [(0, 0)], [(0, 8, 8)], [(0, 1.5)], [[0, 8], [4]], "cosine", 3],
)
def test_schedules_that_are_none_are_refused(schedule):
    with pytest.raises(ValueError, match="Argument `schedule` must be 'ramp', 'doubling', 'seesaw' or pairs"):
        BatchSizeScheduler(schedule)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "doubling", "growth": 3}, "`growth` must be a power of two with 'doubling', but got 3"),
        ({"schedule": "seesaw", "couple": "sqrt"}, "`couple` must be 'none' with 'seesaw', .* but got 'sqrt'"),
        ({"pace": "epochs"}, "`pace` must be 'steps' or 'samples', but got 'epochs'"),
        ({"schedule": [(0, 4)], "first": 4}, "`first` must be None beside pairs, but got 4"),
        ({"schedule": [(0, 4)], "over": 0.5}, "`over` must be None beside pairs, but got 0.5"),
    ],
)
def test_arguments_that_contradict_one_another_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"Argument {message}"):
        BatchSizeScheduler(**arguments)


def test_sizes_below_the_first_have_no_pace_by_samples():
    with pytest.raises(ValueError, match="Argument `pace` must be 'steps' where sizes get smaller"):
        fit(Line(), 8 * ROWS, BatchSizeScheduler([(0, 8), (16, 4)], pace="samples"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "seesaw"}, "`schedule` must not be 'seesaw'"),
        ({"pace": "samples"}, "`pace` must not be 'samples'"),
    ],
)
def test_schedules_that_a_module_steps_itself_are_not_paced(arguments, message):
    with pytest.raises(ValueError, match=f"Argument {message} where the module optimizes by hand"):
        fit(ManualLine(), 8 * ROWS, BatchSizeScheduler(**arguments))


def test_a_schedule_without_a_length_is_refused():
    with pytest.raises(ValueError, match="Argument `schedule` must be pairs in a fit without"):
        fit(Line(), 8 * ROWS, BatchSizeScheduler(), epochs=-1)


def test_a_loader_that_does_not_tell_its_rows_needs_an_argument():
    class Loader:
        def __iter__(self):
            return iter(DataLoader(points(8 * ROWS), ROWS))

        def __len__(self):
            return 8

    with pytest.raises(ValueError, match="Argument `batch_size` must be given for a Loader that has none"):
        trainer(BatchSizeScheduler()).fit(Line(), Loader())
    module = Line()
    trainer(BatchSizeScheduler([(0, 2 * ROWS)], batch_size=ROWS)).fit(module, Loader())
    assert [len(rows) for rows, *_ in module.steps] == [2 * ROWS] * 8


def test_a_module_that_optimizes_by_hand_must_ask_when_to_step():
    with pytest.raises(TypeError, match=r"ManualClassifier.* Set `self\.accumulation = None`"):
        trainer(BatchSizeScheduler()).fit(ManualClassifier(), loader())


def test_optimizers_that_take_turns_are_refused():
    class Turns(ManualLine):
        def training_step(self, batch, batch_idx):
            self.toggle_optimizer(self.optimizers())

    module = Turns()
    with pytest.raises(TypeError, match="does not support `toggle_optimizer`"):
        fit(module, 8 * ROWS, BatchSizeScheduler())
    assert "toggle_optimizer" not in vars(module)
    assert module.accumulation is None


# ---------------------------------------------------------------------- two processes


def main(folder, grow):
    rank = int(os.environ["RANK"])
    module = Line()
    scheduler = BatchSizeScheduler([(0, 2 * ROWS), (4 * ROWS, 6 * ROWS)], grow=grow)
    run = trainer(scheduler, devices=2, strategy="ddp", max_epochs=2, use_distributed_sampler=False)
    # 11 batches; in the last rank 0 has 3 rows and rank 1 has 1
    rows = list(range(0, 43)) if rank == 0 else list(range(43, 84))
    run.fit(module, DataLoader(torch.utils.data.Subset(points(84), rows), ROWS))
    torch.save((module.steps, scheduler.state_dict(), run.global_step), Path(folder, f"{rank}.pt"))


@GROW
def test_two_ranks_step_with_the_gradient_over_the_rows_of_both(tmp_path, grow):
    on_two_ranks(__file__, tmp_path, grow)
    (one, state, count), (other, same, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert state == same
    assert count == len(one) == len(other)
    both = Line()
    both.steps = [(a + b, w, g) for (a, w, g), (b, *_) in zip(one, other, strict=True)]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True))
    assert_gradients_of_large_batches(both, 84)
    assert [len(rows) for rows, *_ in both.steps][:4] == [8, 8, 8, 24]


if __name__ == "__main__":
    main(*sys.argv[1:])
