"""The state of Lightning's loops, asked for in real fits."""

import pytest
import torch
from helpers import Classifier, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging

from curation.callbacks.lightning import loop


class Asks(Callback):
    """What the loop says in every training step."""

    def __init__(self, *questions):
        self.questions, self.answers, self.in_validation = questions, [], []

    def on_train_batch_end(self, trainer, *_):
        self.answers.append(tuple(question(trainer) for question in self.questions))

    def on_validation_batch_end(self, trainer, *_):
        self.in_validation.append(tuple(question(trainer) for question in self.questions))


def test_batches_of_training_are_trained_on_and_those_of_validation_are_not():
    asks = Asks(loop.is_trained_on, loop.skips_backward)
    trainer(asks, max_epochs=1, num_sanity_val_steps=1).fit(
        Classifier(), loader(ids=False), loader(ids=False, shuffle=False)
    )
    assert asks.answers == [(True, False)] * 8
    assert asks.in_validation == [(False, False)] * 9


def test_batches_that_update_averaged_normalisation_are_not_trained_on():
    answers = []

    class Module(Classifier):
        def training_step(self, *args):
            answers.append((loop.is_trained_on(self.trainer), loop.skips_backward(self.trainer)))
            return super().training_step(*args)

    trainer(StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=3).fit(Module(), loader(ids=False))
    assert answers == [(True, False)] * 24 + [(False, True)] * 8


def test_logging_follows_the_step_and_accumulation_the_window():
    asks = Asks(loop.logging_step, loop.logs_now, loop.is_accumulating)
    trainer(asks, max_epochs=1, log_every_n_steps=2, accumulate_grad_batches=3).fit(Classifier(), loader(ids=False))
    accumulating = [True, True, False, True, True, False, True, False]  # the last window is cut by the epoch
    steps = [0, 0, 0, 1, 1, 1, 2, 2]
    assert asks.answers == [
        (step, (step + 1) % 2 == 0, window) for step, window in zip(steps, accumulating, strict=True)
    ]


def test_nothing_is_logged_where_lightning_is_told_not_to():
    asks = Asks(loop.logs_now)
    trainer(asks, max_epochs=1, log_every_n_steps=0).fit(Classifier(), loader(ids=False))
    assert asks.answers == [(False,)] * 8


def test_the_training_loaders_are_those_of_the_fit():
    asks, batches = Asks(loop.training_loaders), loader(ids=False)
    run = trainer(asks, max_epochs=1)
    assert loop.training_loaders(run) == []
    run.fit(Classifier(), batches)
    (loaders,) = asks.answers[-1]
    assert [x.dataset for x in loaders] == [batches.dataset]
    loop.forget_training_loader(run)
    assert loop.training_loaders(run) == []


@pytest.mark.parametrize(
    ("options", "foreseen"),
    [({"max_epochs": 2}, [False] * 8 + [True] * 8), ({"max_epochs": -1, "max_steps": 16}, [False] * 15 + [True])],
)
def test_the_end_of_a_fit_is_foreseen(options, foreseen):
    asks = Asks(lambda run: loop.ends_before(run, run.current_epoch + 1))
    trainer(asks, **options).fit(Classifier(), loader(ids=False))
    assert [answer for (answer,) in asks.answers] == foreseen


def test_a_batch_is_moved_as_the_training_step_gets_it():
    class Doubles(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0], batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, batch[1]]

    run = trainer(precision="64-true", max_epochs=1, limit_train_batches=1)
    run.fit(Doubles(), loader(ids=False))
    x, y = loop.move_to_device(run, [torch.ones(8, 8), torch.ones(8)])
    assert x.dtype == y.dtype == torch.float64
    assert torch.equal(x, torch.full((8, 8), 3.0, dtype=torch.float64))
    moved = loop.move_to_device(run, [torch.ones(8, 8), torch.ones(8)], lambda batch, **_: batch)
    assert torch.equal(moved[0], torch.full((8, 8), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("fails", [False, True])
def test_a_muted_module_logs_nothing_and_can_log_again_afterwards(fails):
    class Module(Classifier):
        def training_step(self, batch, batch_idx):
            try:
                with loop.muted(self):
                    self.log("muted", 1.0)
                    self.log_dict({"muted_too": 1.0})
                    if fails:
                        raise KeyError
            except KeyError:
                pass
            self.log_dict({"heard": 1.0})
            return super().training_step(batch, batch_idx)

    module, run = Module(), trainer(max_epochs=1)
    run.fit(module, loader(ids=False))
    assert run.callback_metrics.keys() == {"heard", "train_loss"}
    assert not {"log", "log_dict"} & vars(module).keys()
