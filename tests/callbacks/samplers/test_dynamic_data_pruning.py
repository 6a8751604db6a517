"""Dynamic pruning in a fit, against loops by hand."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, Classifier, data, loader, trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.utils.data import DataLoader, TensorDataset, default_collate

from curation.batch import SampleIds
from curation.callbacks import DynamicDataPruning, SampleRecord, SelectionLedger, UniformSelection
from curation.records.ledger import Ledger
from curation.samplers import DynamicDataPruningSampler


class Linear(LightningModule):
    """No dropout, so that a loop by hand trains the same weights."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Linear(FEATURES, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Regression(Linear):
    def __init__(self):
        super().__init__()
        self.sample_losses = None

    def training_step(self, batch, batch_idx):
        self.sample_losses = (self(batch[0])[:, 0] - batch[1]).square()
        return self.sample_losses.mean()


def pruned(dataset, size=8, collate=None, **kwargs):
    sampler = DynamicDataPruningSampler(dataset, size, **{"prune": 0.75, "anneal": 1.0, **kwargs})
    return DataLoader(dataset, size, sampler=sampler, collate_fn=collate)


def pairs(n=64, regression=False):
    x, y = data(n).tensors
    return TensorDataset(x, x.sum(1) if regression else y)


def by_hand(module, dataset, epochs, losses_of, lr_scale=0.0, **kwargs):
    """The fit, as a loop that weighs each loss; returns the losses of the record."""
    sampler = DynamicDataPruningSampler(dataset, 8, **{"prune": 0.75, "anneal": 1.0, **kwargs})
    sampler.length = epochs * sampler.steps
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        order = iter(sampler)
        for _ in range(sampler.steps):
            batch = default_collate([dataset[next(order)] for _ in range(8)])
            losses, weights = losses_of(module, batch), sampler.next.weights
            optimizer.zero_grad()
            (losses if weights is None else weights * losses).mean().backward()
            optimizer.param_groups[0]["lr"] = 0.1 * sampler.next.share**-lr_scale
            optimizer.step()
            sampler.trained(losses.detach())
        sampler.end_epoch()
    return sampler.losses


def cross_entropies(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def squares(module, batch):
    return (module(batch[0])[:, 0] - batch[1]).square()


@pytest.mark.parametrize("rule", ["mean", "window", "hide", "random", "proportional"])
@pytest.mark.parametrize(("module", "losses_of"), [(Linear, cross_entropies), (Regression, squares)])
def test_a_fit_trains_what_a_loop_by_hand_trains(module, losses_of, rule):
    dataset = pairs(regression=module is Regression)
    expected, got = module(), module()
    record = by_hand(expected, dataset, 6, losses_of, lr_scale=0.5, rule=rule)
    batches, pruning = pruned(dataset, rule=rule), DynamicDataPruning(lr_scale=0.5)
    trainer(pruning, max_epochs=6).fit(got, batches)
    torch.testing.assert_close(got.net.weight, expected.net.weight)
    torch.testing.assert_close(batches.sampler.losses, record)
    if (module, rule) != (Linear, "hide"):  # which has no sample whose label is probable enough
        assert batches.sampler.visited < 64 * (batches.sampler.round + 1)
    assert pruning.batches == 48


def test_rows_that_a_collate_function_reorders_are_known_by_their_ids():
    def backwards(samples):
        return default_collate(samples[::-1])

    dataset = pairs()
    expected, got = Linear(), Linear()
    record = by_hand(expected, dataset, 4, cross_entropies)
    batches = pruned(SampleIds(dataset), collate=backwards)
    trainer(DynamicDataPruning(), max_epochs=4).fit(got, batches)
    torch.testing.assert_close(batches.sampler.losses, record)
    torch.testing.assert_close(got.net.weight, expected.net.weight)


def test_samples_that_were_not_drawn_are_refused():
    dataset = pairs()
    other = DataLoader(
        SampleIds(dataset),
        8,
        sampler=DynamicDataPruningSampler(dataset, 8),
        collate_fn=lambda samples: default_collate([SampleIds(dataset)[0]] * 8),
    )
    with pytest.raises(ValueError, match=r"holds the samples \[0, 0, 0, 0, 0\]\.\.\., but .* were drawn"):
        trainer(DynamicDataPruning(), max_epochs=1).fit(Linear(), other)
    with pytest.raises(ValueError, match="drew 8 samples for a batch that has 7 rows"):
        trainer(DynamicDataPruning()).fit(Linear(), pruned(dataset, collate=lambda s: default_collate(s[1:])))


class ScoreStep(Linear):
    def score_step(self, batch):
        return self(batch["x"]), batch["y"]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["x"]), batch["y"])


class Elsewhere(Linear):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Penalised(Linear):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.net.weight.square().sum()


class PenalisedRegression(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.net.weight.square().sum()


class RawBackward(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx).backward()


class Scalar(Regression):
    def training_step(self, batch, batch_idx):
        self.sample_losses = super().training_step(batch, batch_idx)
        return self.sample_losses


def as_mapping(samples):
    x, y = default_collate(samples)
    return {"x": x, "y": y}


@pytest.mark.parametrize(
    ("module", "collate", "says"),
    [
        (ScoreStep, as_mapping, r"(?s)not certain for `ScoreStep`.* attribute `sample_losses` \(None\)"),
        (Elsewhere, None, r"`Elsewhere\.training_step` shows no losses of its rows"),
        (Penalised, None, "a part of it is not made of the logits"),
        (PenalisedRegression, None, "a part of it is not made of the logits"),
        (RawBackward, None, r"call `self\.manual_backward\(loss\)`, not `loss\.backward\(\)`"),
        (Scalar, None, r"`Scalar\.sample_losses` must be floating \[8\].* but is torch.float32 \[\]"),
    ],
)
def test_modules_whose_losses_or_weights_are_not_reached_are_refused(module, collate, says):
    dataset = pairs(regression=issubclass(module, Regression))
    with pytest.raises(TypeError, match=says):
        trainer(DynamicDataPruning(), max_epochs=6).fit(module(), pruned(dataset, collate=collate))


def test_without_weights_a_penalty_is_no_trouble():
    batches = pruned(pairs(), rule="proportional")
    trainer(DynamicDataPruning(), max_epochs=4).fit(Penalised(), batches)
    assert batches.sampler.round > 3


def test_a_selection_of_rows_beside_it_and_other_loaders_are_refused():
    with pytest.raises(ValueError, match="UniformSelection leaves some out"):
        trainer(DynamicDataPruning(), UniformSelection(keep=0.5)).fit(Linear(), pruned(pairs()))
    with pytest.raises(ValueError, match=r"needs a training `DataLoader\(sampler=DynamicDataPruningSampler"):
        trainer(DynamicDataPruning()).fit(Linear(), loader())
    dataset = pairs()
    smaller = DataLoader(dataset, 4, sampler=DynamicDataPruningSampler(dataset, 8))
    with pytest.raises(ValueError, match="must have the `batch_size` of its sampler, 8, but has 4"):
        trainer(DynamicDataPruning()).fit(Linear(), smaller)


class Rates(Callback):
    def __init__(self):
        self.outside = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outside.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedulers_and_monitors_see_the_rate_without_the_factor():
    class Scheduled(Linear):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    rates = Rates()
    trainer(DynamicDataPruning(lr_scale=1.0), rates, max_epochs=4).fit(Scheduled(), pruned(pairs(), rule="random"))
    assert rates.outside == pytest.approx([0.1 * 0.9 ** (step + 1) for step in range(32)])


def test_records_and_ledger_get_every_visit(tmp_path):
    record, ledger = SampleRecord(), SelectionLedger(tmp_path / "ledger")
    batches = pruned(pairs())
    trainer(DynamicDataPruning(), record, ledger, max_epochs=4).fit(Linear(), batches)
    torch.testing.assert_close(record.store.scores, batches.sampler.losses)
    assert int(record.store.seen.sum()) == 4 * 64
    rows = Ledger(tmp_path / "ledger").rows()
    assert rows.num_rows == 4 * 64
    assert len(set(rows["weight"].to_pylist())) > 1


def test_a_batch_that_the_step_skips_keeps_its_last_losses():
    class Skips(Linear):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    batches = pruned(pairs())
    trainer(DynamicDataPruning(), max_epochs=1).fit(Skips(), batches)
    assert int(batches.sampler.losses.isnan().sum()) == 8


def test_what_is_logged(tmp_path):
    run = trainer(DynamicDataPruning(), max_epochs=6, log_every_n_steps=1)
    run.fit(Classifier(), pruned(pairs(), rule="random", prune=0.5))
    logged = run.callback_metrics
    assert 0.4 < logged["curation/work_saved"] < 0.5
    assert logged["curation/visited_fraction"] == 0.5
    assert logged["curation/round"] >= 9
    assert 0.5 < logged["curation/mean_age"] < 1.5


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"max_epochs": 3}, 24),
        ({"max_epochs": 3, "limit_train_batches": 5}, 15),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 12),
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 7, "max_epochs": -1, "accumulate_grad_batches": 3}, 2 * 8 + 3),
        ({"max_epochs": -1, "max_time": {"seconds": 1}}, float("inf")),
    ],
)
def test_the_sampler_knows_how_long_the_fit_is(options, batches):
    dataset = pairs()
    loader = pruned(dataset)
    run = trainer(DynamicDataPruning(), **options)
    run.fit(Linear(), loader)
    assert loader.sampler.length == batches
    if batches < 100:
        assert loader.sampler.batches == batches


def test_time_decides_where_the_fit_has_no_length():
    batches = pruned(pairs(), rule="random", prune=0.5, anneal=0.0001)
    trainer(DynamicDataPruning(), max_epochs=-1, max_time={"seconds": 1}).fit(Linear(), batches)
    assert float(batches.sampler.elapsed) > 0.5
    assert batches.sampler.statistics["visited_fraction"] == 1


def test_the_length_counts_what_an_earlier_fit_of_the_trainer_trained():
    batches, run = pruned(pairs()), trainer(DynamicDataPruning(), max_epochs=3)
    run.fit(Linear(), batches)
    run.fit_loop.max_epochs = 6
    run.fit(Linear(), batches)
    assert batches.sampler.batches == batches.sampler.length == 48


def test_the_epoch_that_weight_averaging_adds_does_not_count():
    batches = pruned(pairs())
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    trainer(DynamicDataPruning(), averaging, max_epochs=4).fit(Classifier(), batches)
    assert batches.sampler.length == 32


class Manual(Linear):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_the_steps_of_a_manual_optimisation_are_its_progress():
    batches = pruned(pairs(), rule="random", prune=0.5, anneal=0.5)
    trainer(DynamicDataPruning(), max_steps=40, max_epochs=-1).fit(Manual(), batches)
    assert float(batches.sampler.elapsed) == 1
    assert batches.sampler.statistics["visited_fraction"] == 1


class Fails(Linear):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 2:
            raise KeyError("failed")
        return super().training_step(batch, batch_idx)


class FailsRegression(Regression):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise KeyError("failed")


def test_a_step_that_fails_leaves_the_learning_rate_as_it_was():
    module = Fails()
    run = trainer(DynamicDataPruning(lr_scale=1.0), max_epochs=4)
    with pytest.raises(KeyError):
        run.fit(module, pruned(pairs(), rule="random"))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1


def test_a_step_that_fails_leaves_no_losses_in_the_module():
    module = FailsRegression()
    with pytest.raises(KeyError):
        trainer(DynamicDataPruning()).fit(module, pruned(pairs(regression=True)))
    assert module.sample_losses is None


def test_a_callback_that_was_forgotten_is_missed(recwarn):
    trainer(DynamicDataPruning()).fit(Linear(), pruned(pairs()))
    assert not [w for w in recwarn if "yields the batches of an epoch again" in str(w.message)]
    with pytest.warns(
        UserWarning, match="A DynamicDataPruningSampler yields the batches of an epoch again.*callback"
    ):
        trainer().fit(Linear(), pruned(pairs()))


def test_a_loader_of_validation_with_the_same_sampler_is_refused():
    class Validates(Linear):
        def validation_step(self, batch, batch_idx):
            pass

    batches = pruned(pairs())
    with pytest.raises(RuntimeError, match="Give validation a data loader with another sampler"):
        trainer(DynamicDataPruning(), val_check_interval=3, num_sanity_val_steps=0).fit(Validates(), batches, batches)


class Smoothed(Linear):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.9)


@pytest.mark.parametrize(("module", "warnings"), [(Linear, 0), (Smoothed, 1), (Regression, 0)])
def test_a_loss_that_is_not_the_cross_entropy_of_the_logits_is_said_once(module, warnings, recwarn):
    batches = pruned(pairs(regression=module is Regression), rule="random")
    trainer(DynamicDataPruning(), max_epochs=3).fit(module(), batches)
    said = [str(w.message) for w in recwarn if "which is scored" in str(w.message)]
    assert len(said) == warnings
    assert all("leave the losses in `sample_losses`" in text for text in said)
