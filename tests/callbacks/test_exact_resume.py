"""Exact resume at the places a checkpoint can be taken, and where it cannot be had."""

import pytest
import torch
from curation.callbacks import ExactResume
from helpers import Classifier, Watch, assert_same_weights, data, loader, trainer, weights
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler


def fit(folder, make_loader, resume=None, seed=1, **checkpoint):
    seed_everything(seed, verbose=False)
    module, watch = Classifier(), Watch()
    save = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **checkpoint)
    run = trainer(ExactResume(), watch, save, max_epochs=3, enable_checkpointing=True, val_check_interval=0.5)
    run.fit(module, make_loader(), loader(ids=False, shuffle=False), ckpt_path=resume)
    return weights(module), [b[0][:, 0].tolist() for b in watch.batches]


class Augmented(Dataset):
    """Draws from the main process's stream with every item."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        x, y = data()[i]
        return x + torch.rand(()) * 0.1, y


LOADERS = {
    "shuffled": lambda: loader(ids=False),
    "workers": lambda: loader(ids=False, num_workers=1, persistent_workers=True),
    "batch sampler": lambda: DataLoader(data(), batch_sampler=BatchSampler(RandomSampler(data()), 8, False)),
    "own generator": lambda: loader(ids=False, generator=torch.Generator().manual_seed(5)),
    "augmented": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "no batching": lambda: DataLoader([tuple(t[i : i + 8] for t in data().tensors) for i in range(0, 64, 8)], None),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        ("epoch=0-step=3.ckpt", {"every_n_train_steps": 3}),
        ("epoch=1-step=15.ckpt", {"every_n_train_steps": 3}),
        ("epoch=1-step=12.ckpt", {"every_n_epochs": 1, "save_on_train_epoch_end": False}),
        ("epoch=0-step=8.ckpt", {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
    ],
    ids=["first epoch", "second epoch", "validation", "epoch end"],
)
def test_resume_from_anywhere_is_bit_identical(tmp_path, kind, name, checkpoint):
    whole, seen = fit(tmp_path, LOADERS[kind], **checkpoint)
    resumed, again = fit(tmp_path, LOADERS[kind], resume=tmp_path / name, seed=77, **checkpoint)
    assert again == seen[-len(again) :]
    assert len(again) == 24 - int(name.split("step=")[1].split(".")[0])
    assert_same_weights(whole, resumed)


def test_what_cannot_be_skipped_is_said(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([data()[i] for i in range(64)])

    with pytest.warns(UserWarning, match="ExactResume cannot skip batches of DataLoader"):
        trainer(ExactResume(), max_epochs=1).fit(Classifier(), DataLoader(Stream(), 8))


def test_another_number_of_processes_is_an_error():
    callback = ExactResume()
    run = trainer(callback, max_epochs=1)
    run.fit(Classifier(), loader(ids=False))
    state = callback.state_dict()
    callback.setup(run, None, "fit")
    with pytest.raises(ValueError, match="saved by 2 processes and cannot be resumed exactly by 1"):
        callback.load_state_dict({**state, "now": state["now"] * 2})
