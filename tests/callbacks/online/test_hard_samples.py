"""Hard-sample selection in a fit."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Classifier,
    LanguageModel,
    ManualClassifier,
    Watch,
    assert_same_weights,
    data,
    loader,
    texts,
    trainer,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from curation.callbacks import HardSampleSelection, UtilityDiversitySelection
from curation.callbacks.lightning.loop import logging_step
from curation.callbacks.online.row_weights import RowWeights
from curation.callbacks.online.scoring_pass import Scoring
from curation.scoring import per_sample_grad_norm, per_sample_loss

RULES = ["top", "rank", "selective_backprop", "importance"]


class Plain(Classifier):
    """No BatchNorm, no dropout: a step on weighted rows can be done by hand."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Linear(8, 4)


class TakesWeights(Plain):
    sample_weights = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        return (losses * self.sample_weights).mean() if self.sample_weights is not None else losses.mean()


class Keeps(Callback):
    """The rows and weights that were trained on."""

    def __init__(self, selection):
        self.selection, self.steps = selection, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        choice = self.selection._choice
        self.steps.append((batch, choice.scores, choice.rows, choice.weights))


class Regression(Plain):
    """The squared error of the first output."""

    def score_step(self, batch):
        x, y = batch
        return (self(x)[:, 0] - y).square()

    def training_step(self, batch, batch_idx):
        return self.score_step(batch).mean()


@pytest.mark.parametrize("rule", RULES)
def test_losses_of_any_task_are_scores(rule):
    """Also of importance, whose weights reach the loss by the outputs of ``forward``."""
    module, selection = Regression(), HardSampleSelection(keep=0.5, rule=rule)
    keeps = Keeps(selection)
    run = trainer(selection, keeps, max_epochs=1)
    run.fit(module, loader())
    scored = [choice for choice in keeps.steps if choice[1] is not None]
    assert len(scored) == 8
    x, y = keeps.steps[0][0]
    with torch.no_grad():
        losses = Regression().score_step((x, y))
    torch.testing.assert_close(keeps.steps[0][1][keeps.steps[0][2]], losses)
    assert run.callback_metrics["curation/candidate_loss"] > 0


class ScoredText(LanguageModel):
    """Its head is wider than its input, and would be left out of a pass over logits."""

    def score_step(self, batch):
        logits = self.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none")
        return losses.sum(1) / batch["labels"][:, 1:].ne(-100).sum(1)


def test_a_language_model_may_return_losses():
    selection = HardSampleSelection(keep=0.5)
    record = Keeps(selection)
    trainer(selection, record, max_epochs=1).fit(ScoredText(), DataLoader(texts(), 8))
    plain = HardSampleSelection(keep=0.5)
    kept = Keeps(plain)
    trainer(plain, kept, max_epochs=1).fit(LanguageModel(), DataLoader(texts(), 8))
    for got, expected in zip(record.steps, kept.steps, strict=True):
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        TypeError, match=r"`rule='importance'` needs the lengths .*ScoredText.score_step` returns losses"
    ):
        trainer(HardSampleSelection(0.5, rule="importance")).fit(ScoredText(), DataLoader(texts(), 8))


def test_rules_that_need_logits_say_so():
    with pytest.raises(
        TypeError,
        match=r"`score='grad_norm'` needs logits, but of `Regression` there are losses only, from score_step",
    ):
        trainer(HardSampleSelection(0.5, score="grad_norm")).fit(Regression(), loader())
    with pytest.raises(
        TypeError, match=r"UtilityDiversitySelection needs logits, but of `Regression` there are losses only"
    ):
        trainer(UtilityDiversitySelection(0.5)).fit(Regression(), loader())


@pytest.mark.parametrize(
    "bad",
    [{"rule": "hardest"}, {"score": "entropy"}, {"pressure": 0.5}, {"pressure": "high"}, {"beta": -1.0}, {"keep": 2}],
)
def test_a_bad_argument_is_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"Argument `{name}` must be .* but got {re.escape(repr(value))}"):
        HardSampleSelection(**{"keep": 0.5, **bad})


def test_the_old_name_of_a_rule_is_an_alias():
    """YAML files and checkpoints of before keep loading."""
    assert HardSampleSelection(keep=0.5, rule="cdf").rule == "selective_backprop"
    fits = []
    for rule in ("cdf", "selective_backprop"):
        torch.manual_seed(0)  # dropout
        module, selection = Classifier(), HardSampleSelection(keep=0.5, rule=rule)
        trainer(selection, max_epochs=1).fit(module, loader(shuffle=False))
        fits.append({**weights(module), "pool": selection.pool})
    assert_same_weights(*fits)


def test_top_keeps_the_rows_of_highest_loss():
    selection = HardSampleSelection(keep=0.25)
    module, seen = Classifier(), Keeps(selection)
    trainer(selection, seen, max_epochs=1, limit_train_batches=1).fit(module, loader(ids=False, shuffle=False))
    (_, scores, rows, row_weights) = seen.steps[0]
    x, y = data().tensors
    expected = F.cross_entropy(Classifier().eval()(x[:8]), y[:8], reduction="none")
    torch.testing.assert_close(scores, expected)
    assert rows.tolist() == sorted(expected.topk(2).indices.tolist())
    assert row_weights is None


@pytest.mark.parametrize("score", ["loss", "grad_norm"])
@pytest.mark.parametrize("soft_cap", [None, 0.1])
def test_scores_of_a_language_model_are_taken_at_scored_positions_unless_that_differs(score, soft_cap):
    selection = HardSampleSelection(keep=0.25, score=score)
    module, seen = LanguageModel(soft_cap), Keeps(selection)
    trainer(selection, seen, max_epochs=1, limit_train_batches=1).fit(module, DataLoader(texts(), 8))
    batch = next(iter(DataLoader(texts(), 8)))
    module = LanguageModel(soft_cap)
    with torch.no_grad():
        logits = module.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    value = per_sample_loss if score == "loss" else per_sample_grad_norm
    torch.testing.assert_close(seen.steps[0][1], value(logits, batch["labels"][:, 1:]), rtol=1e-4, atol=1e-5)
    assert ("at scored positions only" in selection.describe()) == (soft_cap is None)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Wrapping(SingleDeviceStrategy):
    """As DDP: the training step is run as a ``forward`` of the module."""

    def setup(self, trainer):
        super().setup(trainer)
        self.model = Wrapper(self.model)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, Wrapping])
@pytest.mark.parametrize("cls", [Plain, TakesWeights])
def test_importance_weights_reach_the_gradient(cls, strategy):
    selection = HardSampleSelection(keep=0.5, rule="importance", score="grad_norm")
    module, seen = cls(), Keeps(selection)
    before = weights(module)
    run = trainer(selection, seen, max_epochs=1, limit_train_batches=1, strategy=strategy(torch.device("cpu")))
    run.fit(module, loader(ids=False))
    (x, y), _, _, row_weights = seen.steps[0]
    assert len(row_weights.unique()) > 1
    by_hand = cls()
    by_hand.load_state_dict(before)
    (F.cross_entropy(by_hand.net(x), y, reduction="none") * row_weights).mean().backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9).step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_weights_reach_a_hugging_face_model_that_computes_its_own_loss():
    selection = HardSampleSelection(keep=0.5, rule="importance", score="grad_norm")
    module, seen = LanguageModel(lr=0.1), Keeps(selection)
    trainer(selection, seen, max_epochs=1, limit_train_batches=1).fit(module, DataLoader(texts(), 8))
    batch, _, _, row_weights = seen.steps[0]
    by_hand = LanguageModel()
    logits = by_hand.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    ((losses * row_weights[:, None]).sum() / batch["labels"][:, 1:].ne(-100).sum()).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_weights_that_do_not_reach_the_loss_are_an_error_before_the_first_gradient():
    class Bypasses(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(x), y)  # not through `forward`

    module = Bypasses()
    before = weights(module)
    with pytest.raises(TypeError, match=r"did not reach the loss of Bypasses\. Add an attribute `sample_weights`"):
        trainer(HardSampleSelection(keep=0.5, rule="importance")).fit(module, loader(ids=False))
    assert_same_weights(before, weights(module))


def test_weights_are_those_of_one_step_only():
    class Validates(TakesWeights):
        def validation_step(self, batch, batch_idx):
            assert self.sample_weights is None

    module = Validates()
    selection = HardSampleSelection(keep=0.5, rule="importance")
    trainer(selection, max_epochs=1, val_check_interval=2).fit(module, loader(), loader(shuffle=False))
    assert module.sample_weights is None


@pytest.mark.parametrize("rule", RULES)
def test_an_accumulated_fit_and_a_second_one_work(rule):
    selection = HardSampleSelection(keep=0.25, rule=rule)
    module = Classifier()
    for _ in range(2):
        trainer(selection, accumulate_grad_batches=3, max_epochs=1).fit(module, loader())
    assert set(module.seen) == {2}


def test_the_selection_pressure_falls_to_one():
    pressures = []

    class Asks(HardSampleSelection):
        def choose(self, trainer, scores, k):
            pressures.append(self.pressure ** (1 - logging_step(trainer) / self._steps))
            return super().choose(trainer, scores, k)

    trainer(Asks(keep=0.25, rule="rank", pressure=16.0), max_epochs=2).fit(Classifier(), loader())
    assert pressures == pytest.approx([16 ** (1 - t / 16) for t in range(16)])


def test_a_fit_of_unknown_length_keeps_its_pressure_and_says_so():
    selection = HardSampleSelection(keep=0.25, rule="rank")
    stop = trainer(selection, Stop(), max_epochs=-1)
    with pytest.warns(UserWarning, match="length of the fit is unknown"):
        stop.fit(Classifier(), loader())


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


def test_rules_with_less_pressure_keep_easier_rows():
    gaps = {}
    for rule in RULES:
        gap = []

        class Gap(Callback):
            def on_train_batch_end(self, trainer, *_):
                gap.append(float(trainer.callback_metrics["curation/score_gap"]))  # noqa: B023

        score = "grad_norm" if rule == "importance" else "loss"
        selection = HardSampleSelection(keep=0.25, rule=rule, score=score)
        module = Classifier()
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.0)
        # The gap is logged after this callback of the same step, so the first is missing.
        trainer(Watch(), selection, Gap(), max_epochs=20).fit(module, loader(128))
        gaps[rule] = sum(gap) / len(gap)
    assert gaps["top"] > gaps["selective_backprop"] > gaps["rank"] > 0
    assert gaps["importance"] > 0


def test_variance_reduction_is_logged():
    run = trainer(HardSampleSelection(keep=0.25, rule="importance", score="grad_norm"), max_epochs=1)
    run.fit(Classifier(), loader())
    assert float(run.callback_metrics["curation/variance_reduction"]) > 1


def test_weights_that_another_forward_seems_to_take_are_an_error():
    class LogsOnly(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            self.accuracy = (self(x).argmax(1) == y).float().mean()  # through `forward`, but not into the loss
            return F.cross_entropy(self.net(x), y)

    class ByHand(ManualClassifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            F.cross_entropy(self.net(x), y).backward()  # calls no hook of Lightning's

    for module in (LogsOnly(), ByHand()):
        with pytest.raises(TypeError, match="did not reach the loss of"):
            trainer(HardSampleSelection(keep=0.5, rule="importance")).fit(module, loader(ids=False))


def test_an_attribute_that_is_in_use_is_not_overwritten():
    module = TakesWeights()
    module.sample_weights = torch.ones(3)
    with pytest.raises(ValueError, match=r"`TakesWeights.sample_weights` must be None before training"):
        trainer(HardSampleSelection(keep=0.5, rule="importance")).fit(module, loader(ids=False))
    assert module.sample_weights.tolist() == [1, 1, 1]


def test_the_gradient_of_sequences_of_unequal_length_is_unbiased():
    module, batch = LanguageModel(), next(iter(DataLoader(texts(16), 16)))
    targets = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = module.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    scores, lengths = per_sample_grad_norm(logits, targets), targets.ne(-100).sum(1)
    selection = HardSampleSelection(keep=0.25, rule="importance", score="grad_norm")
    run, selection.row_weights = trainer(), RowWeights(module, None)
    estimates = []
    for step in range(4000):
        selection.batches, selection.scored = step, Scoring(lengths=lengths.float())
        rows, row_weights = selection.choose(run, scores, 4)
        estimates.append(float((losses[rows] * row_weights[:, None]).sum() / lengths[rows].sum()))
    estimates = torch.tensor(estimates)
    off = estimates.mean() - losses.sum() / lengths.sum()
    assert abs(float(off)) < 3 * float(estimates.std()) / 4000**0.5
    assert float(estimates.std() / estimates.mean()) < 0.5


class Sequences(Classifier):
    """Every token of a row has logits of its own, so the gradients of rows do not mix."""

    def __init__(self, mean, weighs_itself=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Embedding(4, 3)
        self.mean, self.gradients = mean, []
        if weighs_itself:
            self.sample_weights = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.mean == "torch":
            return F.cross_entropy(self(x).mT, y)
        losses = F.cross_entropy(self(x).mT, y, reduction="none")
        if self.mean == "positions":
            return losses.sum() / y.ne(-100).sum()
        losses = losses.sum(1) / y.ne(-100).sum(1)
        weights = getattr(self, "sample_weights", None)
        return (losses if weights is None else losses * weights).mean()

    def on_after_backward(self):
        self.gradients.append(self.net.weight.grad.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("mean", "k", "weighs_itself"),
    [
        ("rows", 1, False),
        ("rows", 1, True),
        ("rows", 3, False),
        ("torch", 1, False),
        ("torch", 3, False),
        ("positions", 3, False),
    ],
)
def test_every_row_of_unequal_length_gets_its_gradient_in_expectation(mean, k, weighs_itself):
    lengths = torch.tensor([2, 18, 5, 9])
    x = torch.arange(4)[:, None].expand(4, 18)
    y = torch.zeros(4, 18, dtype=torch.long).masked_fill(torch.arange(18) >= lengths[:, None], -100)
    module, steps = Sequences(mean, weighs_itself), 1000
    (whole,) = torch.autograd.grad(module.training_step((x, y), 0), [module.net.weight])
    selection = HardSampleSelection(keep=k / 4, rule="importance", score="grad_norm")
    batches = DataLoader(torch.utils.data.TensorDataset(x.repeat(steps, 1), y.repeat(steps, 1)), 4)
    trainer(selection, max_epochs=1, log_every_n_steps=0).fit(module, batches)
    gradients = (torch.stack(module.gradients) * whole).sum(2) / whole.square().sum(1)
    error = gradients.std(0) / steps**0.5
    assert bool(((gradients.mean(0) - 1).abs() < 4 * error + 1e-4).all())


def test_a_loss_that_is_not_all_made_of_the_logits_is_refused():
    class Auxiliary(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.net.weight.square().mean()

    class Weighted(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y, torch.tensor([1.0, 2.0, 3.0, 4.0]))

    for module, text in ((Auxiliary(), "a part of it is not made of the logits"), (Weighted(), "class weights")):
        before = weights(module)
        with pytest.raises(TypeError, match=rf"{text}.* Add an attribute `sample_weights`"):
            trainer(HardSampleSelection(keep=0.5, rule="importance")).fit(module, loader(ids=False))
        assert_same_weights(before, weights(module))


def test_a_step_that_skips_its_batch_is_skipped():
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    module = Skips()
    trainer(HardSampleSelection(keep=0.5, rule="importance"), max_epochs=1).fit(module, loader(ids=False))
    assert len(module.seen) == 8


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_without_labels_breaks_no_weight(rule):
    batches = [next(iter(DataLoader(texts(), 8))) for _ in range(3)]
    batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    module = LanguageModel(lr=0.1)
    trainer(HardSampleSelection(keep=0.5, rule=rule), max_epochs=1).fit(module, DataLoader(batches, batch_size=None))
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_weights_reach_logits_that_forward_makes_beside_a_score_step():
    class Both(Plain):
        def score_step(self, batch):
            return self.net(batch["x"]), batch["y"]

        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    x, y = data().tensors
    batches = DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], 8)
    module, selection = Both(), HardSampleSelection(keep=0.5, rule="importance", score="grad_norm")
    trainer(selection, max_epochs=1).fit(module, batches)
    assert module.seen == [4] * 8


def test_irreducible_losses_of_a_stream_are_found_by_id(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{"x": x, "y": y, "sample_id": i} for i, (x, y) in enumerate(data(16))])

    class Steps(Plain):
        def score_step(self, batch):
            return self.net(batch["x"]), batch["y"]

        def training_step(self, batch, batch_idx):
            self.kept = batch["x"]
            return F.cross_entropy(*self.score_step(batch))

    x, y = data(16).tensors
    table = torch.rand(16, generator=torch.Generator().manual_seed(0))
    losses = F.cross_entropy(Plain().net(x), y, reduction="none") - table
    for size in (16, 15):
        torch.save(table[:size], tmp_path / "table.pt")
        rule = HardSampleSelection(keep=0.25, score="reducible_loss", irreducible=str(tmp_path / "table.pt"))
        module, fit = Steps(), trainer(rule, max_epochs=1)
        if size == 16:
            fit.fit(module, DataLoader(Stream(), 16))
            assert torch.equal(module.kept, x[losses.topk(4).indices.sort().values])
        else:
            with pytest.raises(ValueError, match=r"`irreducible` must name a file .* a sample has the id 15"):
                fit.fit(module, DataLoader(Stream(), 16))


def test_the_pool_takes_every_score_of_batches_that_grow():
    sizes = [2, 6, 4]
    batches = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(3)]
    selection = HardSampleSelection(keep=0.5, rule="selective_backprop")
    trainer(selection, max_epochs=1).fit(Plain(), DataLoader(data(12), batch_sampler=batches))
    assert selection.pool.shape == (12,)
    assert selection.pool.isfinite().all()


@pytest.mark.parametrize("score", ["loss", "grad_norm"])
def test_scores_in_bf16_are_those_of_the_fit_but_for_rounding(score):
    seen = []

    class Looks(Plain):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return self.net(x)

        def training_step(self, batch, batch_idx):
            assert not torch.is_autocast_enabled("cpu")
            return F.cross_entropy(self(batch[0]), batch[1])

    steps = {}
    for precision in ("fit", "bf16"):
        torch.manual_seed(0)  # of the order
        selection = HardSampleSelection(keep=0.5, score=score, precision=precision)
        keeps = Keeps(selection)
        trainer(selection, keeps, max_epochs=1).fit(Looks(), loader())
        steps[precision] = keeps.steps
    exact, rounded = (steps[precision][0][1] for precision in ("fit", "bf16"))
    assert any(seen)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.03, atol=0.03)


def test_a_precision_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"Argument `precision` must be 'fit' or 'bf16', but got 'fp16'"):
        HardSampleSelection(keep=0.5, precision="fp16")
