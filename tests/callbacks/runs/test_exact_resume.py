"""Exact resume at the places a checkpoint can be taken, and where it cannot be had."""

import warnings

import pytest
import torch
from helpers import Classifier, Watch, assert_same_weights, data, loader, trainer, weights
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
)

from curation.callbacks import ExactResume, RunMeter, UniformSelection, UtilityDiversitySelection


def fit(folder, make_loader, resume=None, seed=1, module=Classifier, options=None, **checkpoint):
    seed_everything(seed, verbose=False)
    module, watch = module(), Watch()
    save = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **checkpoint)
    options = {"max_epochs": 3, "val_check_interval": 0.5, **(options or {})}
    extra = options.pop("callbacks", [])
    run = trainer(ExactResume(), watch, save, *extra, enable_checkpointing=True, **options)
    run.fit(module, make_loader(), loader(ids=False, shuffle=False), ckpt_path=resume)
    return weights(module), [b[0][:, 0].tolist() for b in watch.batches]


class Augmented(Dataset):
    """Draws from the main process's stream with every item."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        x, y = data()[i]
        return x + torch.rand(()) * 0.1, y


class OwnOrder(Sampler):
    """Shuffles by its epoch, as distributed samplers do, or by a generator of its own."""

    def __init__(self, generator=None):
        self.generator, self.epoch = generator, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 64

    def __iter__(self):
        generator = self.generator or torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(64, generator=generator).tolist())


LOADERS = {
    "shuffled": lambda: loader(ids=False),
    "workers": lambda: loader(ids=False, num_workers=1, persistent_workers=True),
    "batch sampler": lambda: DataLoader(data(), batch_sampler=BatchSampler(RandomSampler(data()), 8, False)),
    "own generator": lambda: loader(ids=False, generator=torch.Generator().manual_seed(5)),
    "sampler's generator": lambda: DataLoader(data(), 8, sampler=OwnOrder(torch.Generator().manual_seed(5))),
    "set_epoch": lambda: DataLoader(data(), 8, sampler=OwnOrder()),
    "set_epoch, workers": lambda: DataLoader(data(), 8, sampler=OwnOrder(), num_workers=1),
    "augmented": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "no batching": lambda: DataLoader([tuple(t[i : i + 8] for t in data().tensors) for i in range(0, 64, 8)], None),
}


EVERYWHERE = {
    "every step": {"every_n_train_steps": 1},
    "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "epoch end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("place", EVERYWHERE)
def test_resume_from_everywhere_is_bit_identical(tmp_path, kind, place):
    """Three epochs of eight batches, a validation after every fourth."""
    checkpoint = EVERYWHERE[place]
    whole, seen = fit(tmp_path / "whole", LOADERS[kind], **checkpoint)
    saved = sorted((tmp_path / "whole").glob("*.ckpt"), key=step_of)
    assert [step_of(file) for file in saved][-1] == 24
    # Every place in an epoch, and both sides of its end.
    for file in saved if kind == "shuffled" else [f for f in saved if step_of(f) in (3, 4, 8, 12, 15, 16)]:
        resumed, again = fit(tmp_path / "again", LOADERS[kind], resume=file, seed=77, **checkpoint)
        assert again == seen[step_of(file) :]
        assert_same_weights(whole, resumed)


def step_of(file) -> int:
    return int(file.stem.split("step=")[1].split("-")[0])


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 5},
        {"accumulate_grad_batches": 2},
        {"check_val_every_n_epoch": 2, "val_check_interval": 1.0},
        {"max_steps": 20, "max_epochs": -1},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=lambda o: next(iter(o)),
)
def test_resume_is_bit_identical_whatever_ends_an_epoch(tmp_path, options):
    save = {"every_n_train_steps": 1, "options": options}
    whole, seen = fit(tmp_path / "whole", LOADERS["shuffled"], **save)
    batches = options.get("accumulate_grad_batches", 1)
    for file in [f for f in (tmp_path / "whole").glob("*.ckpt") if step_of(f) in (3, 4, 5, 8, 12)]:
        resumed, again = fit(tmp_path / "again", LOADERS["shuffled"], resume=file, seed=77, **save)
        assert again == seen[step_of(file) * batches :]
        assert_same_weights(whole, resumed)


def test_a_run_that_stopped_inside_an_epoch_can_be_extended(tmp_path):
    save = {"every_n_train_steps": 1, "save_last": True}
    whole, seen = fit(tmp_path / "whole", LOADERS["shuffled"], options={"max_steps": 20, "max_epochs": -1}, **save)
    fit(tmp_path / "short", LOADERS["shuffled"], options={"max_steps": 11, "max_epochs": -1}, **save)
    longer = {"max_steps": 20, "max_epochs": -1}
    last = tmp_path / "short" / "last.ckpt"
    resumed, again = fit(tmp_path / "again", LOADERS["shuffled"], resume=last, options=longer, **save)
    assert again == seen[11:]
    assert_same_weights(whole, resumed)


def test_what_is_drawn_between_the_batches_is_not_carried_into_them(tmp_path):
    """Hooks of the module draw, and the checkpoint is saved between the draw and the next batch."""

    class Draws(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            batch[0].add_(torch.rand_like(batch[0]))

        def on_validation_epoch_start(self):
            torch.rand(3)

        def on_train_epoch_end(self):
            torch.rand(5)

    whole, _ = fit(tmp_path / "whole", LOADERS["shuffled"], module=Draws, every_n_train_steps=4)
    for file in (tmp_path / "whole").glob("*.ckpt"):
        resumed, _ = fit(
            tmp_path / "again", LOADERS["shuffled"], resume=file, seed=9, module=Draws, every_n_train_steps=4
        )
        assert_same_weights(whole, resumed)


@pytest.mark.parametrize("rule", [UniformSelection, UtilityDiversitySelection])
def test_a_checkpoint_of_a_failed_step_repeats_the_step(tmp_path, rule):
    """The selection of the batch that failed is not counted and not remembered."""

    class Fails(Classifier):
        fail_at = 5

        def training_step(self, batch, batch_idx):
            if self.global_step == self.fail_at:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    class Lasts(Fails):
        fail_at = 99

    def run(folder, module, resume=None):
        seed_everything(1, verbose=False)
        module, watch, selection = module(), Watch(), rule(keep=0.25)
        save = ModelCheckpoint(folder, save_on_exception=True)
        fitter = trainer(selection, ExactResume(), watch, save, enable_checkpointing=True)
        fitter.fit(module, loader(), ckpt_path=resume)
        state = {k: v for k, v in selection.state_dict().items() if k != "train_seconds"}
        return weights(module), repr(state), [b[0][:, 0].tolist() for b in watch.batches]

    whole, state, seen = run(tmp_path / "whole", Lasts)
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path / "failed", Fails)
    (file,) = (tmp_path / "failed").glob("*.ckpt")
    resumed, state_again, again = run(tmp_path / "again", Lasts, file)
    assert again == seen[5:]
    assert state_again == state
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("how", ["test", "validate", "predict"])
@pytest.mark.parametrize("new", [True, False], ids=["new trainer", "same trainer"])
def test_a_checkpoint_can_be_evaluated_and_changes_no_counter(tmp_path, how, new):
    rule, resume = UtilityDiversitySelection(keep=0.25), ExactResume()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    run = trainer(rule, resume, save, enable_checkpointing=True, max_epochs=1)
    run.fit(Classifier(), loader(), loader(shuffle=False))
    if new:
        run = trainer(UtilityDiversitySelection(keep=0.25), ExactResume())
    getattr(run, how)(Classifier(), loader(shuffle=False), ckpt_path=tmp_path / "step=3.ckpt")
    assert (rule.batches, rule.samples_trained, resume.batches) == (8, 16, 8)


def test_what_cannot_be_skipped_is_said():
    class Batches:
        def __iter__(self):
            return iter([tuple(t[i : i + 8] for t in data().tensors) for i in range(0, 64, 8)])

    with pytest.warns(UserWarning, match="ExactResume cannot skip batches of Batches"):
        trainer(ExactResume(), max_epochs=1).fit(Classifier(), Batches())


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"n": 32}], ids=["batch size", "data"])
def test_another_epoch_than_the_saved_one_is_an_error(tmp_path, change):
    fit(tmp_path, LOADERS["shuffled"], every_n_train_steps=3)
    file = tmp_path / "epoch=0-step=3.ckpt"
    message = "saved after 3 of 8 batches of an epoch, but the data loader now has (16|4)"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "again", lambda: loader(ids=False, **change), resume=file)


def test_the_data_loader_and_the_strategy_are_as_they_were():
    batches, changed = loader(ids=False), []

    class Resizes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.train_dataloader.batch_sampler.batch_size = 4

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            changed.append(len(batch[0]))

    prepared = []
    run = trainer(ExactResume(), Resizes(), max_epochs=2)
    run.strategy.process_dataloader = stand_in = lambda loader: prepared.append(loader) or loader
    before = batches.batch_sampler
    run.fit(Classifier(), batches)
    assert run.strategy.process_dataloader is stand_in
    assert prepared
    assert batches.batch_sampler is before
    assert changed == [8] * 8 + [4] * 8  # the epoch's length is Lightning's and was fixed before


def test_it_can_be_added_to_a_run_that_did_without(tmp_path):
    """Epoch 2 has the order that the sampler has in epoch 2, not that of epoch 0."""
    sampler = DistributedSampler(data(), num_replicas=1, rank=0, shuffle=True)
    first = trainer(max_epochs=2)
    first.fit(Classifier(), DataLoader(data(), 8, sampler=sampler))
    first.save_checkpoint(tmp_path / "x.ckpt")
    watch = Watch()
    trainer(ExactResume(), watch, max_epochs=3).fit(
        Classifier(), DataLoader(data(), 8, sampler=sampler), ckpt_path=tmp_path / "x.ckpt", weights_only=True
    )
    sampler.set_epoch(2)
    expected = data().tensors[0][list(sampler)]
    assert torch.equal(torch.cat([x for x, _ in watch.batches]), expected)


@pytest.mark.parametrize("end", ["max_steps", "budget"])
@pytest.mark.parametrize("longer", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 24}], ids=["epochs", "steps"])
def test_a_fit_that_a_budget_ended_inside_an_epoch_goes_on_inside_it(tmp_path, end, longer):
    """The checkpoint is saved at the end of the epoch that was cut, which Lightning takes for a finished one."""
    whole, seen = fit(tmp_path / "whole", LOADERS["shuffled"])
    options = {"max_steps": 11} if end == "max_steps" else {"callbacks": [RunMeter(tmp_path / "run.json", 11)]}
    fit(tmp_path / "cut", LOADERS["shuffled"], options={**options, "val_check_interval": 1.0}, save_last=True)
    last = tmp_path / "cut" / "last.ckpt"
    resumed, again = fit(tmp_path / "again", LOADERS["shuffled"], resume=last, seed=77, options=longer)
    assert again == seen[11:]
    assert_same_weights(whole, resumed)


def test_a_tuner_that_fails_leaves_nothing_behind():
    class Fails(Classifier):
        lr = 0.1

        def training_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    batches = loader(ids=False)
    before, run = batches.batch_sampler, trainer(LearningRateFinder(num_training_steps=3), ExactResume())
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(Fails(), batches)
    assert batches.batch_sampler is before
    assert not {"batch_to_device", "process_dataloader", "teardown"} & vars(run.strategy).keys()


def test_a_step_that_fetches_its_batches_is_refused():
    class Fetches(Classifier):
        def training_step(self, dataloader_iter):
            raise AssertionError("trained")

    with pytest.raises(TypeError, match=r"Fetches.training_step\(dataloader_iter\)` fetches its own batches"):
        trainer(ExactResume()).fit(Fetches(), loader(ids=False))


class Stateful:
    """A loader that resumes itself."""

    def __iter__(self):
        return iter([[torch.zeros(8, 8), torch.zeros(8).long()]] * 3)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class SizedStateful(Stateful):
    def __len__(self):
        return 3


def test_a_stateful_loader_is_warned_of_where_lightning_loses_batches(tmp_path):
    def run(make, resume=None):
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fitter = trainer(ExactResume(), save, enable_checkpointing=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitter.fit(Classifier(), make(), ckpt_path=resume)
        return [str(w.message) for w in caught if "ExactResume leaves" in str(w.message)]

    assert run(SizedStateful) == run(SizedStateful, tmp_path / "step=2.ckpt") == []
    (warning,) = run(SizedStateful, tmp_path / "step=3.ckpt")
    assert "saved after the last batch of an epoch" in warning
    (warning,) = run(Stateful)
    assert "each resume loses a batch" in warning


def test_a_fit_that_is_resumed_at_a_short_batch_does_not_ask_for_a_larger_one(tmp_path):
    """The last batch of an epoch has 4 rows, as many as are kept of the 8 of the others."""

    def fit(**resume):
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
        run = trainer(UniformSelection(keep=0.5), ExactResume(), save, max_epochs=1, enable_checkpointing=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(Classifier(), loader(52), **resume)
        return [str(w.message) for w in caught if "enlarge the batch" in str(w.message)]

    assert fit() == fit(ckpt_path=tmp_path / "step=6.ckpt") == []
