"""Fits that end at any hook and go on from any checkpoint; what they trained on is saved with them."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers import trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from curation.callbacks import ExactResume

HOOKS = (
    "training_step", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_start", "on_validation_end",
)  # fmt: skip
SAVES = ("step", "epoch", "validation", "exception", "end", "early")
ENDS = (*HOOKS, "max_steps", "should_stop", "should_stop and validate")


@dataclass
class Interruption:
    """How a part of a run ends: at the ``count``-th call of a hook, or without an error after so many batches."""

    kind: str
    count: int


@dataclass
class Run:
    """A run and how its parts end.

    Attributes:
        options: Arguments of :func:`fit`.
        save: When checkpoints are saved.
        interruptions: How the parts end; the last one is not interrupted.
        early: Whether errors come before the other callbacks are called.
    """

    options: dict
    save: str
    interruptions: list[Interruption]
    early: bool


def draw_run(rng: random.Random) -> Run:
    """A run of one to three epochs of two to eight batches, whose parts end at random places."""
    size, epochs, limit = rng.choice([2, 3, 8]), rng.randint(1, 3), rng.choice(["max_epochs", "max_steps", "both"])
    broken = {rng.randrange(16)} if limit == "max_epochs" and rng.random() < 0.2 else ()  # such batches are no steps
    accumulate = 1 if broken else rng.choice([1, 1, 2, 3])
    batches = math.ceil(16 / size)
    options = {"size": size, "broken": broken, "accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
    if rng.random() < 0.2:
        options["limit_train_batches"] = batches = min(batches, 3)
    options |= rng.choice([{"validates": False}, {"validates": True}, {"validates": True, "val_check_interval": 0.5}])
    steps = epochs * math.ceil(batches / accumulate)
    options["max_epochs"] = -1 if limit == "max_steps" else epochs
    options["max_steps"] = {"max_epochs": -1, "max_steps": steps, "both": steps + 1}[limit]
    places = {"epoch": epochs, "validation": epochs, "max": steps, "": epochs * batches}
    interruptions = []
    for _ in range(rng.choice([1, 2])):
        kind = rng.choice(ENDS)
        most = next(n for name, n in places.items() if name in kind)
        interruptions.append(Interruption(kind, rng.randint(1, most)))
    save = rng.choice([name for name in SAVES if name != "end"])
    if all(interruption.kind in ENDS[len(HOOKS) :] for interruption in interruptions):
        save = rng.choice(SAVES)
    return Run(options, save, interruptions, early=rng.random() < 0.3)


class Rows(LightningModule):
    """Remembers the rows of every batch that was trained on, in its checkpoints too."""

    def __init__(self, interruption: Interruption | None):
        super().__init__()
        self.weight, self.trained, self.interruption = nn.Parameter(torch.zeros(())), [], interruption
        self.calls = dict.fromkeys(HOOKS, 0)

    def call(self, hook):
        self.calls[hook] += 1
        if self.interruption and self.interruption.kind == hook and self.calls[hook] == self.interruption.count:
            raise InterruptedError(hook)

    def training_step(self, batch, batch_idx):
        self.call("training_step")
        self.trained.append([*batch.tolist(), self.current_epoch, batch_idx, float(torch.rand(()))])
        return (self.weight - batch.float()).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["trained"] = list(self.trained)

    def on_load_checkpoint(self, checkpoint):
        self.trained = list(checkpoint["trained"])


class Interrupts(Callback):
    """Ends the fit at a hook; where it is first, before the other callbacks have been called."""

    def __init__(self, module):
        self.module = module

    def __getattribute__(self, name):
        if name in HOOKS[1:]:
            return lambda trainer, *_: trainer.sanity_checking or self.module.call(name)
        return super().__getattribute__(name)


class Stops(Callback):
    """Ends the fit without an error after some batches, as a budget does."""

    def __init__(self, count, validates):
        self.count, self.validates = count, validates

    def on_train_batch_end(self, trainer, *_):
        self.count -= 1
        if self.count == 0:
            trainer.should_stop = True
            trainer.check_val_every_n_epoch = 1 if self.validates else trainer.check_val_every_n_epoch


class SavesEarly(Callback):
    """Saves before the other callbacks have counted the batch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "early.ckpt")


def collate(broken):
    return lambda rows: None if rows[0] % 16 in broken else torch.tensor(rows)


def fit(folder, options, save=None, interruption=None, early=False, seed=1, **resume):
    """One part of a run of 16 rows; all that was trained on since its beginning, if it came to its end."""
    seed_everything(seed, verbose=False)
    options = dict(options)
    size, broken, validates = options.pop("size"), options.pop("broken", ()), options.pop("validates")
    module = Rows(interruption)
    train = DataLoader(range(16), size, shuffle=True, collate_fn=collate(broken))
    callbacks = [Interrupts(module)] if early else []
    kind, count = (interruption.kind, interruption.count) if interruption else (None, 0)
    callbacks += [SavesEarly(folder)] if save == "early" else []
    callbacks += [ExactResume()]
    callbacks += [] if early else [Interrupts(module)]
    callbacks += [Stops(count, kind.endswith("validate"))] if kind and kind.startswith("should") else []
    if save in ("step", "epoch", "validation", "exception"):
        when = {
            "step": {"every_n_train_steps": 1},
            "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
            "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
            "exception": {"every_n_epochs": 1, "save_on_exception": True},
        }[save]
        callbacks.append(ModelCheckpoint(folder, "{step}", save_top_k=-1, **when))
    if kind == "max_steps":
        options["max_steps"] = count
    run = trainer(*callbacks, **options, enable_checkpointing=save in SAVES[:4])
    try:
        run.fit(module, train, DataLoader(range(2)) if validates else None, **resume)
    except InterruptedError:
        return None
    if save == "end":
        run.save_checkpoint(folder / "end.ckpt")
    return module.trained


def last_checkpoint(folder: Path):
    """The newest file, or None."""
    return max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)
