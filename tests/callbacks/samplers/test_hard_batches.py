"""Hard-batch training in a fit."""

import pytest
import torch
from helpers import Classifier, ManualClassifier, data, loader, trainer
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader
from twins import slow_hard_batches

from curation.batch import SampleIds
from curation.callbacks import ExactResume, HardBatchTraining
from curation.samplers.hard_batches import HardBatchSampler


class Steps(Callback):
    """The loss of every step and the rows it was trained on."""

    def __init__(self):
        self.losses, self.rows = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.rows.append(batch[0][:, 0].tolist())


def hard(n=64, size=8, **kwargs):
    dataset = SampleIds(data(n))
    return DataLoader(dataset, size, sampler=HardBatchSampler(dataset, size, delta=0.25, **kwargs))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"limit_train_batches": 5}])
def test_a_fit_visits_what_the_rule_says(options):
    steps, batches = Steps(), hard()
    trainer(HardBatchTraining(), steps, max_epochs=4, **options).fit(Classifier(), batches)
    expected = slow_hard_batches(8, 0.25, lambda step, batch: steps.losses[step], len(steps.rows))
    x = data().tensors[0]
    assert steps.rows == [x[batches.sampler._cut[b], 0].tolist() for b in expected]
    assert len(steps.rows) == 4 * options.get("limit_train_batches", 8)


def test_delta_one_is_plain_training_on_fixed_batches():
    steps, dataset = Steps(), data()
    sampler = HardBatchSampler(dataset, 8, delta=1.0)
    trainer(HardBatchTraining(), steps, max_epochs=2).fit(Classifier(), DataLoader(dataset, 8, sampler=sampler))
    assert steps.rows[:8] == steps.rows[8:]


def test_an_epoch_that_a_hook_ends_early_does_not_shorten_the_next():
    class Stops(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 3 else None

    steps = Steps()
    trainer(HardBatchTraining(), steps, max_epochs=2).fit(Stops(), hard())
    assert len(steps.rows) == 3 + 8


def test_a_loader_without_the_sampler_or_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"needs a training `DataLoader\(sampler=HardBatchSampler.*RandomSampler"):
        trainer(HardBatchTraining()).fit(Classifier(), loader())
    dataset = data()
    smaller = DataLoader(dataset, 4, sampler=HardBatchSampler(dataset, 8))
    with pytest.raises(ValueError, match="must have the `batch_size` of its sampler, 8, but has 4"):
        trainer(HardBatchTraining()).fit(Classifier(), smaller)


def test_a_module_without_a_loss_is_named():
    class Silent(ManualClassifier):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return None

    with pytest.raises(TypeError, match=r"`Silent\.training_step` must return its loss to be ranked"):
        trainer(HardBatchTraining()).fit(Silent(), hard())


def test_a_second_fit_goes_on_with_its_own_sampler():
    callback = HardBatchTraining()
    for _ in range(2):
        steps, batches = Steps(), hard()
        trainer(callback, steps, ExactResume(), max_epochs=2).fit(Classifier(), batches)
        assert callback.sampler is batches.sampler
        assert torch.isfinite(batches.sampler.losses).all()
        assert len(steps.rows) == 16


def test_reloaded_loaders_go_on_with_the_round_and_a_new_fit_begins_anew():
    class Reloads(LightningDataModule):
        def train_dataloader(self):
            return hard()

    steps, callback = Steps(), HardBatchTraining()
    run = trainer(callback, steps, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    run.fit(Classifier(), datamodule=Reloads())
    expected = slow_hard_batches(8, 0.25, lambda step, batch: steps.losses[step], 24)
    x, cut = data().tensors[0], callback.sampler._cut
    assert steps.rows == [x[cut[b], 0].tolist() for b in expected]

    class Fails(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("stop")

    batches = hard()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(HardBatchTraining(), max_epochs=2).fit(Fails(), batches)
    again = Steps()
    trainer(HardBatchTraining(), again, max_epochs=1).fit(Classifier(), batches)
    assert again.rows == [x[rows, 0].tolist() for rows in cut]
