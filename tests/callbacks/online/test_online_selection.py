"""The base of the online rules: how many rows, which, and what is reported."""

import pickle

import numpy as np
import pytest
import torch
from helpers import AnyBatch, Classifier, ManualClassifier, Watch, data, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchmetrics import SumMetric

from curation.callbacks import (
    ExactResume,
    HardSampleSelection,
    OnlineSelection,
    UniformSelection,
    UtilityDiversitySelection,
)
from curation.callbacks.online import step_timer


class HighestLabel(OnlineSelection):
    """A rule as small as a rule can be."""

    def score(self, trainer, pl_module, batch, sample_ids):
        return batch[1].float()


class Constant(OnlineSelection):
    value = torch.nan

    def score(self, trainer, pl_module, batch, sample_ids):
        scores = torch.arange(len(batch[0])).float()
        scores[5] = self.value
        return scores


def test_the_rows_with_the_highest_scores_are_kept():
    watch, raw = Watch(), Watch()
    trainer(HighestLabel(keep=0.25), watch, max_epochs=1).fit(Classifier(), loader(shuffle=False))
    trainer(raw, max_epochs=1).fit(Classifier(), loader(shuffle=False, ids=False))
    for kept, full in zip(watch.batches, raw.batches, strict=True):
        y = full[1]
        rows = sorted(sorted(range(8), key=lambda i: -y[i])[:2])
        assert torch.equal(kept[0], full[0][rows])


@pytest.mark.parametrize(
    ("value", "rows"), [(torch.nan, [6, 7]), (torch.inf, [6, 7]), (-torch.inf, [6, 7]), (99.0, [5, 7])]
)
def test_scores_that_are_not_finite_rank_last(value, rows):
    rule, watch, raw = Constant(keep=0.25), Watch(), Watch()
    rule.value = value
    trainer(rule, watch, max_epochs=1, limit_train_batches=1).fit(Classifier(), loader(shuffle=False))
    trainer(raw, max_epochs=1, limit_train_batches=1).fit(Classifier(), loader(shuffle=False, ids=False))
    assert torch.equal(watch.batches[0][0], raw.batches[0][0][rows])


def test_k_is_fixed_by_the_first_batch_and_a_short_batch_keeps_what_it_has():
    module = Classifier()
    trainer(HighestLabel(keep=0.5), max_epochs=1).fit(module, loader(n=8 + 8 + 3, ids=False))
    assert module.seen == [4, 4, 3]


def test_keeping_everything_counts_every_row_of_a_batch_that_is_larger_than_the_first(recwarn):
    rule, batches = UniformSelection(keep=1.0), DataLoader(data(), batch_sampler=[[0, 1], [2, 3, 4, 5, 6]])
    run = trainer(rule, max_epochs=1)
    run.fit(Classifier(), batches)
    assert rule.samples_trained == 7
    assert run.callback_metrics["curation/kept_fraction"] == 1
    assert not [w for w in recwarn if "vary in size" in str(w.message)]


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan"), None, "half"])
@pytest.mark.parametrize("rule", [UniformSelection, UtilityDiversitySelection])
def test_keep_out_of_range_is_named(rule, keep):
    with pytest.raises(ValueError, match=rf"Argument `keep` must be in \(0, 1\], but got {keep!r}"):
        rule(keep=keep)


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (torch.zeros(3), r"torch\.float32 \[3\]"),
        (torch.arange(8), r"torch\.int64 \[8\]"),
        ([0.0] * 8, "list"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_scores_that_are_not_a_number_per_row_are_named(scores, got):
    class Wrong(OnlineSelection):
        def score(self, *_):
            return scores

    with pytest.raises(ValueError, match=rf"`score` must give one floating number per row, \[8\], but gave {got}"):
        trainer(Wrong(keep=0.5)).fit(Classifier(), loader())


@pytest.mark.parametrize("seed", [-1, 0.5, None, "a", 2**63])
def test_a_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match=rf"Argument `seed` must be an integer in \[0, 2\^63\), but got {seed!r}"):
        UtilityDiversitySelection(keep=0.5, seed=seed)


def test_numbers_of_numpy_are_numbers():
    rule = UtilityDiversitySelection(keep=np.float32(0.25), alpha=np.float64(2), seed=np.int64(3))
    assert [type(v) for v in (rule.keep, rule.alpha, rule.seed)] == [float, float, int]


def test_a_rule_without_scores_cannot_be_made():
    with pytest.raises(TypeError, match=r"abstract method .?score"):
        OnlineSelection(keep=0.5)


def test_a_batch_too_small_to_select_from_is_said():
    with pytest.warns(UserWarning, match=r"`keep=0.8` of a candidate batch of 2 is every row"):
        trainer(UniformSelection(keep=0.8), max_epochs=1).fit(Classifier(), loader(n=4, batch_size=2))


def test_scores_that_are_not_finite_are_said_even_if_nothing_is_logged():
    with pytest.warns(UserWarning, match="8 of 64 scores so far are not finite"):
        trainer(Constant(keep=0.25), max_epochs=1, log_every_n_steps=0).fit(Classifier(), loader())


def test_empty_batches_pass():
    """Lightning skips them with a warning."""
    module = Classifier()
    batches = DataLoader(data(), 8, collate_fn=lambda s: default_collate(s) if s[0][0][0] > 0 else None)
    trainer(UniformSelection(keep=0.25), ExactResume(), max_epochs=1).fit(module, batches)
    assert 0 < len(module.seen) < 8


def test_another_keep_or_batch_size_counts_after_a_resume(tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4)
    trainer(UniformSelection(keep=0.25), save, enable_checkpointing=True, max_epochs=1).fit(Classifier(), loader())
    for keep, size, k in ((0.25, 8, 2), (0.75, 8, 6), (0.25, 16, 4), (0.5, 4, 2)):
        module = Classifier()
        run = trainer(UniformSelection(keep=keep), max_epochs=2)
        run.fit(module, loader(batch_size=size), ckpt_path=tmp_path / "step=8.ckpt")
        assert set(module.seen) == {k}


def test_a_short_first_batch_after_a_resume_does_not_change_k(tmp_path):
    def run(resume=None):
        module = Classifier()
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        fitter = trainer(UniformSelection(keep=0.5), ExactResume(), save, enable_checkpointing=True)
        fitter.fit(module, loader(n=8 + 8 + 6), ckpt_path=resume)
        return module.seen

    assert run() == [4, 4, 4] * 2
    assert run(tmp_path / "step=2.ckpt") == [4] * 4


def test_a_second_fit_begins_anew():
    rule, seen = UniformSelection(keep=0.25), []
    for _ in range(2):
        watch = Watch()
        trainer(rule, watch, max_epochs=1).fit(Classifier(), loader(shuffle=False))
        seen.append(torch.stack([b[0] for b in watch.batches]))
        assert rule.samples_trained == 16
    assert torch.equal(*seen)
    pickle.dumps(rule)


def test_a_trainer_inside_a_trainer_leaves_no_seam():
    class Nested(Callback):
        def on_train_epoch_start(self, outer, *_):
            trainer(rule, max_epochs=1, limit_train_batches=1).fit(Classifier(), loader())

    rule = UniformSelection(keep=0.25)
    outer = trainer(rule, Nested(), max_epochs=1)
    outer.fit(Classifier(), loader())
    assert "batch_to_device" not in vars(outer.strategy)


def test_uniform_draws_every_row_equally_often_and_repeats_by_seed():
    def kept(seed):
        watch = Watch()
        trainer(UniformSelection(keep=0.25, seed=seed), watch, max_epochs=40).fit(Classifier(), loader(shuffle=False))
        return torch.stack([b[0][:, 0] for b in watch.batches])

    first = kept(0)
    assert torch.equal(first, kept(0))
    assert not torch.equal(first, kept(1))
    values, counts = first.flatten().unique(return_counts=True)
    assert len(values) == 64
    assert counts.max() < 20
    assert counts.min() > 2  # 10 expected of 40 draws, deviation 2.7


def test_manual_optimisation_sees_the_kept_rows():
    module = ManualClassifier()
    trainer(UtilityDiversitySelection(keep=0.25), max_epochs=1).fit(module, loader())
    assert module.seen == [2] * 8


def test_accumulation_averages_equal_micro_batches():
    """The gradient of two micro-batches of k rows is that of one batch of 2 k rows."""
    module = Classifier()
    module.net[1].eval(), module.net[3].eval()
    watch = Watch()
    run = trainer(HighestLabel(keep=0.25), watch, accumulate_grad_batches=2, limit_train_batches=2, max_epochs=1)
    start = {k: v.clone() for k, v in module.named_parameters()}

    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)
    module.net[1].train = module.net[3].train = lambda mode=True: None
    run.fit(module, loader(shuffle=False, ids=False))
    x, y = (torch.cat([b[i] for b in watch.batches]) for i in (0, 1))
    reference = Classifier()
    reference.eval()
    torch.nn.functional.cross_entropy(reference(x), y).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            dict(module.named_parameters())[name], start[name] - parameter.grad, rtol=1e-4, atol=1e-6
        )


def test_self_log_inside_forward_is_ignored_while_scoring():
    class Logs(Classifier):
        def forward(self, x):
            self.log("in_forward", 1.0)
            self.log_dict({"in_forward_too": 1.0})
            return super().forward(x)

    run = trainer(UtilityDiversitySelection(keep=0.5), max_epochs=1)
    run.fit(Logs(), loader())
    assert run.callback_metrics["in_forward"] == 1


def test_the_user_is_told_once_what_is_selected(caplog):
    with caplog.at_level("INFO"):
        trainer(UtilityDiversitySelection(keep=0.25)).fit(Classifier(), loader())
    (line,) = [r.message for r in caplog.records if "candidate batch" in r.message]
    assert "UtilityDiversitySelection: scores by forward(x), from logits; candidate batch 8, trained batch 2" in line


def test_statistics_reach_any_logger_under_their_names(tmp_path):
    rule = UtilityDiversitySelection(keep=0.25)
    run = trainer(rule, logger=CSVLogger(tmp_path), log_every_n_steps=2, max_epochs=2)
    run.fit(Classifier(), loader(), loader())
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    names = ("kept_fraction", "score_gap", "candidate_loss", "samples_scored", "samples_trained", "train_seconds")
    for name in names:
        assert f"curation/{name}" in text.splitlines()[0]
    metrics = run.callback_metrics
    assert metrics["curation/kept_fraction"] == 0.25
    assert metrics["curation/score_gap"] > 0
    assert (metrics["curation/samples_scored"], metrics["curation/samples_trained"]) == (128, 32)
    assert 0 < metrics["curation/train_seconds"] < 60


def test_candidate_loss_is_the_mean_over_all_candidates():
    module = Classifier()
    rows = []

    class Spy(UtilityDiversitySelection):
        def outputs(self, trainer, pl_module, batch, head=None):
            logits, targets = super().outputs(trainer, pl_module, batch, head)
            rows.append(torch.nn.functional.cross_entropy(logits, targets))
            return logits, targets

    run = trainer(Spy(keep=0.25), max_epochs=1)
    run.fit(module, loader())
    torch.testing.assert_close(run.callback_metrics["curation/candidate_loss"], rows[-1])


def test_weights_and_biases_gets_a_histogram_and_one_table(tmp_path):
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    trainer(UtilityDiversitySelection(keep=0.25), logger=logger, max_epochs=2).fit(Classifier(), loader())
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["curation/scores"]["_type"] == "histogram"
    assert sum(summary["curation/scores"]["values"]) == 8
    assert summary["curation/samples"]["_type"] == "table-file"
    assert summary["curation/samples"]["nrows"] == 64
    assert summary["curation/samples_trained"] == 32


def test_the_table_survives_an_exception(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("stop")

    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(UtilityDiversitySelection(keep=0.25), Fails(), logger=logger).fit(Classifier(), loader())
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["curation/samples"]["nrows"] == 24


def test_the_progress_bar_shows_the_loss_of_all_candidates():
    run = trainer(UtilityDiversitySelection(keep=0.25), log_every_n_steps=4, max_epochs=1)
    run.fit(Classifier(), loader())
    assert run.progress_bar_metrics["curation/samples_trained"] == 16
    assert run.progress_bar_metrics["curation/candidate_loss"] > 0


@pytest.mark.parametrize("module", [Classifier, ManualClassifier])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_tensorboard_gets_histograms_at_the_steps_of_all_other_metrics(tmp_path, module, accumulate):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if module is ManualClassifier and accumulate > 1:
        pytest.skip("Lightning refuses accumulation in manual optimisation")
    logger = TensorBoardLogger(tmp_path)
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    trainer(UtilityDiversitySelection(keep=0.25), logger=logger, **options).fit(module(), loader())
    events = EventAccumulator(logger.log_dir, {"scalars": 0, "histograms": 0}).Reload()
    steps = [e.step for e in events.Scalars("curation/score_gap")]
    assert steps
    assert [e.step for e in events.Histograms("curation/scores")] == steps


@pytest.mark.parametrize(
    ("precision", "asked", "dtype"),
    [
        ("32-true", "fit", torch.float32),
        ("bf16-mixed", "fit", torch.bfloat16),
        ("32-true", "bf16", torch.bfloat16),
        ("64-true", "fit", torch.float64),
    ],
)
def test_scoring_runs_in_the_precision_of_the_fit_or_the_one_asked_for(precision, asked, dtype):
    dtypes = set()

    class Spy(UtilityDiversitySelection):
        def outputs(self, *args):
            logits, targets = super().outputs(*args)
            dtypes.add(logits.dtype)
            return logits, targets

    trainer(Spy(keep=0.25, precision=asked), precision=precision, max_epochs=1).fit(Classifier(), loader())
    assert dtypes == {dtype}


def test_a_score_step_takes_any_batch():
    module = AnyBatch()
    trainer(UtilityDiversitySelection(keep=0.25), max_epochs=1).fit(module, loader())
    assert module.seen == [2] * 8


class FakeTime:
    """A clock that the module's passes move on: a forward row costs 1, a backward row ``b``."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Costs(Classifier):
    def __init__(self, clock, b):
        super().__init__()
        self.clock, self.b = clock, b

    def forward(self, x):
        self.clock.now += len(x)
        return super().forward(x)

    def on_after_backward(self):
        self.clock.now += self.b * self.seen[-1]


@pytest.mark.parametrize(("b", "pays"), [(2.0, True), (0.2, False)])
def test_selection_that_does_not_pay_is_left_out(monkeypatch, b, pays):
    clock = FakeTime()
    monkeypatch.setattr(step_timer, "time", clock)
    selection = HardSampleSelection(keep=0.25, when="pays")
    module = Costs(clock, b)
    run = trainer(selection, max_epochs=4, log_every_n_steps=1)
    run.fit(module, loader())
    assert module.seen[:8] == [2, 8] * 4
    assert set(module.seen[8:]) == {2 if pays else 8}
    predicted = (1 + b) * 8 / (8 + (1 + b) * 2)
    assert float(run.callback_metrics["curation/predicted_speedup"]) == pytest.approx(predicted)
    assert float(run.callback_metrics["curation/realised_speedup"]) == pytest.approx(predicted if pays else 1.0)
    assert selection.samples_trained == sum(module.seen)
    assert selection.samples_scored == 8 * module.seen.count(2)


def test_a_window_of_accumulation_is_all_selected_or_all_full(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(step_timer, "time", clock)
    module = Costs(clock, 0.2)
    trainer(HardSampleSelection(keep=0.25, when="pays"), max_epochs=4, accumulate_grad_batches=3).fit(
        module, loader()
    )
    for epoch in range(4):
        epoch_sizes = module.seen[8 * epoch : 8 * epoch + 8]
        for window in (epoch_sizes[:3], epoch_sizes[3:6], epoch_sizes[6:]):
            assert len(set(window)) == 1
    assert set(module.seen) == {2, 8}


def test_when_is_checked():
    with pytest.raises(ValueError, match="Argument `when` must be 'always' or 'pays', but got 'never'"):
        UniformSelection(keep=0.5, when="never")


class ChangesThings(Classifier):
    """A forward that works in place, updates a metric and a buffer, and takes its labels out of the batch."""

    def __init__(self):
        super().__init__()
        self.rows, self.passes, self.largest = SumMetric(), nn.Module(), 0.0
        self.total = Total()

    def forward(self, x):
        x.div_(100)
        self.rows.update(len(x))
        self.total(len(x))
        if torch.is_grad_enabled():
            self.largest = max(self.largest, float(x.max()))
        return super().forward(x)

    def score_step(self, batch):
        inputs = batch["inputs"]
        return self(inputs["x"]), inputs.pop("y")

    def training_step(self, batch, batch_idx):
        x, y = batch["inputs"]["x"], batch["inputs"].pop("y")
        return super().training_step((x, y), batch_idx)


class Total(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.cached = 0

    def forward(self, rows):
        self.rows += rows
        self.last = torch.tensor(float(rows))  # goes with the attribute, as in a cache of positions
        self.cached = rows


class OwnMargin(OnlineSelection):
    def score(self, trainer, pl_module, batch, sample_ids):
        logits = pl_module(batch["inputs"]["x"])
        batch["inputs"].clear()
        return -logits.topk(2).values.diff()[:, 0]


@pytest.mark.parametrize("rule", [HardSampleSelection, UtilityDiversitySelection, OwnMargin])
def test_a_scoring_pass_leaves_no_trace(rule):
    samples = [{"inputs": {"x": torch.full((8,), 100.0), "y": i % 4}} for i in range(32)]
    module = ChangesThings()
    trainer(rule(keep=0.25), max_epochs=1).fit(module, DataLoader(samples, 8))
    assert module.seen == [2] * 4
    assert module.largest == 1.0
    assert int(module.rows.compute()) == int(module.total.rows) == 8
    assert int(module.total.last) == module.total.cached == 2
    assert int(module.net[1].num_batches_tracked) == 4


def test_a_rule_may_ask_for_gradients():
    class GradNorm(OnlineSelection):
        guarded = False

        def score(self, trainer, pl_module, batch, sample_ids):
            x = batch[0].clone().requires_grad_()
            with self.scoring(trainer, pl_module), torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(pl_module(x), batch[1], reduction="sum")
            return torch.autograd.grad(loss, x)[0].norm(dim=1)

    module = Classifier()
    trainer(GradNorm(keep=0.25), max_epochs=1).fit(module, loader())
    assert module.seen == [2] * 8
    assert int(module.net[1].num_batches_tracked) == 8


@pytest.mark.parametrize(("sizes", "kept"), [([8, 32, 4, 64], 0.25), ([32] + [4] * 30, 0.25)])
def test_batches_that_miss_the_budget_are_said(sizes, kept):
    ends = np.cumsum(sizes).tolist()
    batches = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    with pytest.warns(UserWarning, match=rf"`keep={kept}` is that of the first batch of {sizes[0]} candidates"):
        trainer(UniformSelection(keep=kept), max_epochs=1).fit(
            Classifier(), DataLoader(data(ends[-1]), batch_sampler=batches)
        )


def test_a_batch_without_rows_names_the_callback_and_the_remedy():
    for batches in (
        DataLoader(range(8), batch_size=None),
        DataLoader([{"a": torch.zeros(3), "b": 1}] * 8, 4, collate_fn=list),
    ):
        with pytest.raises(
            TypeError, match=r"UniformSelection keeps rows of tensors\..* Let `collate_fn` make tensors"
        ):
            trainer(UniformSelection(keep=0.5)).fit(AnyBatch(), batches)


def test_a_logger_that_fails_hides_no_error_and_stops_no_other_callback(tmp_path):
    class Dies(WandbLogger):
        def log_metrics(self, metrics, step=None):
            if step and step >= 4:
                raise ConnectionError("away")

        def log_table(self, *args, **kwargs):
            raise ConnectionError("still away")

    class Later(Callback):
        saw = None

        def on_exception(self, trainer, pl_module, exception):
            self.saw = exception

    later, run = Later(), None
    run = trainer(HardSampleSelection(keep=0.5), later, logger=Dies(save_dir=tmp_path, mode="disabled"))
    with (
        pytest.raises(ConnectionError, match=r"^away$"),
        pytest.warns(UserWarning, match="'curation/samples' was not"),
    ):
        run.fit(Classifier(), loader())
    assert str(later.saw) == "away"
    assert "batch_to_device" not in vars(run.strategy)
