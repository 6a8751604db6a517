"""What the contract suite runs in processes of its own."""

import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from helpers import Classifier, LanguageModel, data, texts, trainer
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, default_collate
from twins import UniformTwin, slow_diverse, slow_hard_batches, slow_pruning, tags

from contract.registry import CALLBACKS, write_tags
from curation.callbacks import ExactResume, InstanceSelection, SelectionLedger
from curation.records.ledger import Ledger
from curation.samplers.dynamic_pruning import DynamicDataPruningSampler
from curation.samplers.hard_batches import HardBatchSampler

# Of these two ranks are compared with one process here; of the others, in tests of their own.
OF_BATCHES = [entry for entry in CALLBACKS.values() if entry.module is Classifier and entry.joined == 1]
LR = 0.01  # the products with a trained head are 100 batches old at most; the twin's are new


class KeptRows(Callback):
    """What names every row trained on."""

    def __init__(self) -> None:
        self.rows: list[list] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(first_tokens(batch) if isinstance(batch, dict) else batch[0][:, 0].tolist())


def first_tokens(batch: dict) -> list[list[int]]:
    return batch["input_ids"][:, :4].tolist()


class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until(
    name: str, folder: Path, workers: int, kill_at: int | None, resume: str | None, out: Path | None
) -> None:
    """Train 3 epochs of 8 batches with a checkpoint every 5 steps."""
    # Loader workers must be children of this process, to end with it when it is killed.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    seed_everything(7, verbose=False)
    kept = KeptRows()
    entry = CALLBACKS[name]
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    write_tags(64)
    callbacks = [*entry.in_trainer(), *([] if entry.cls is ExactResume else [ExactResume()]), kept]
    callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1))
    if kill_at is not None:
        callbacks.append(Kill(kill_at))
    run = trainer(*callbacks, max_epochs=3, enable_checkpointing=True, default_root_dir=folder)
    module = entry.module()
    loader = entry.loader(num_workers=workers)
    val = DataLoader(entry.dataset(data(16)), 8)
    run.fit(module, loader, val, ckpt_path=resume)
    rows = Ledger("ledger").rows().to_pylist() if entry.cls is SelectionLedger else []
    result = {"rows": kept.rows, "weights": module.state_dict(), "callbacks": _states(run), "ledger": repr(rows)}
    torch.save(result, out)


def _states(run) -> dict:
    states = {}
    for callback in run.callbacks:
        if type(callback) in {entry.cls for entry in CALLBACKS.values()}:
            state = dict(callback.state_dict())
            for clock in ("train_seconds", "seconds"):
                state.pop(clock, None)
            for point in state.get("points", []):
                del point["seconds"]
            state.pop("run", None)  # a random name
            states[type(callback).__name__] = state
    return states


class Sharded(LanguageModel):
    """Each layer's parameters are divided between the ranks."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in (*self.model.model.layers, self.model):
            fully_shard(part, mesh=mesh)


def sharded(module: type[Classifier]) -> type[Classifier]:
    class ShardedClassifier(module):  # type: ignore[misc, valid-type]
        def configure_model(self) -> None:
            for part in (self.net[-2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    return ShardedClassifier


def short_on_rank_one(samples):
    """The last batch has 3 rows on rank 0 and 1 on rank 1, fewer than k."""
    return default_collate(samples[:1] if len(samples) < 8 and os.environ.get("RANK") == "1" else samples)


class Saves(Callback):
    """A checkpoint after the first batch and the last one of an epoch, its validation, and an exception."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        name = {0: "first", 2: "last"}.get(batch_idx)
        if name and not trainer.current_epoch:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking and not trainer.current_epoch:
            trainer.save_checkpoint(self.folder / "validation.ckpt")

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.folder / "exception.ckpt")


class Fails(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4:
            raise InterruptedError


def interrupted(name: str, folder: Path, fails: bool = False, resume: Path | None = None) -> dict:
    """Two epochs of three batches, saved at every boundary and ended in the second, or resumed from there."""
    seed_everything(7, verbose=False)
    os.chdir(folder)
    write_tags(24)
    entry, kept = CALLBACKS[name], KeptRows()
    callbacks = [*entry.in_trainer(), *([] if entry.cls is ExactResume else [ExactResume()]), kept]
    run, module = trainer(*callbacks, *([Saves(folder), Fails()] if fails else [])), entry.module()
    batches, val = entry.loader(data(24 * entry.candidates)), DataLoader(entry.dataset(data(8)), 8)
    try:
        run.fit(module, batches, val, ckpt_path=resume)
    except InterruptedError:
        assert fails
    states = _states(run)
    if name == "RunMeter":  # Lightning leaves out the validation before which a checkpoint was saved
        del states[name]["points"][:-1]
    return {"rows": kept.rows, "weights": module.state_dict(), "callbacks": states}


class StopsAt(Callback):
    """A checkpoint after so many batches, with which the fit ends."""

    def __init__(self, batch: int, path: str) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def elastic(given: tuple[str, str, int, bool, bool]) -> dict:
    """An epoch of four batches of 16 samples over all processes, up to its second or from there."""
    name, folder, processes, stops, resumes = given
    seed_everything(7, verbose=False)
    os.chdir(folder)
    write_tags(64)
    entry, rows = CALLBACKS[name], []
    numbers = {float(x[0]): i for i, (x, _) in enumerate(data(64 * entry.candidates))}

    class Candidates(entry.module):  # type: ignore[name-defined]
        def on_before_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                rows.append([numbers[float(x)] for x in batch[0][:, 0]])
            return batch

    callbacks = [*entry.in_trainer(), *([] if entry.cls is ExactResume else [ExactResume()])]
    how = {"strategy": "ddp", "devices": 2} if processes == 2 else {}
    stop = [StopsAt(1, f"{folder}/x.ckpt")] if stops else []
    run, module = trainer(*callbacks, *stop, max_epochs=1, **how), Candidates()
    run.fit(module, entry.loader(batch_size=16 // processes), ckpt_path=f"{folder}/x.ckpt" if resumes else None)
    acted, ended = bool(entry.acted(callbacks[0])), stops or run.current_epoch == 1
    return {"rows": rows, "seen": module.seen, "acted": acted, "ended": ended}


SIZES = (5, 3)  # of the batches of rank 1; those of rank 0 have 8 rows


def unequal(samples):
    """By what is in them, since some callbacks load batches before their time."""
    return default_collate(samples[: SIZES[int(samples[0][0][0] > 0)]] if os.environ["RANK"] == "1" else samples)


def unequal_rank(given: tuple[str, str]) -> dict:
    """An epoch of an entry on one of two gloo ranks."""
    name, folder = given
    seed_everything(7, verbose=False)
    os.chdir(folder)
    entry = CALLBACKS[name]
    module, callbacks = entry.module(), entry.in_trainer()
    run = trainer(*callbacks, strategy="ddp", devices=2, max_epochs=1)
    run.fit(module, entry.loader(collate_fn=unequal))
    weights = {name: value.tolist() for name, value in module.named_parameters()}
    acted, state = entry.acted(callbacks[0]), repr(_states(run))
    return {"seen": module.seen, "acted": bool(acted), "state": state, "weights": weights}


def two_ranks(rank: int, port: int, folder: Path, names: list[str]) -> None:
    """The entries of these names once, on one of two gloo ranks."""
    torch.set_num_threads(1)
    os.environ.update(
        TORCHELASTIC_RUN_ID="contract", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    for name in names:
        entry = CALLBACKS[name]
        for strategy in ("ddp", "fsdp2") if entry in OF_BATCHES else ("ddp", "fsdp2", "without"):
            seed_everything(7, verbose=False)  # the seed of Lightning's distributed sampler too
            kept = KeptRows()
            resumer = [] if entry.cls is ExactResume else [ExactResume()]
            how = ModelParallelStrategy(2, 1) if strategy == "fsdp2" else "ddp"
            here = folder / f"{name}-{strategy}"
            here.mkdir(exist_ok=True)
            os.chdir(here)
            if entry in OF_BATCHES:
                write_tags(2 * 19)
                module = (LanguageModel if strategy == "ddp" else Sharded)(lr=LR)
                batches = entry.loader(texts(2 * 19), collate_fn=short_on_rank_one)
            else:
                module = (sharded(entry.module) if strategy == "fsdp2" else entry.module)()
                batches = entry.loader()
            how_long = {"max_epochs": 2, "logger": CSVLogger(here)}
            own = [] if strategy == "without" else entry.in_trainer()
            run = trainer(*own, *resumer, kept, strategy=how, devices=2, **how_long)
            run.fit(module, batches)
            if rank == 1:
                torch.distributed.barrier()
            states = _states(run)  # one rank at a time: a collective in `state_dict` would meet the barrier
            if rank == 0:
                torch.distributed.barrier()
            weights = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in module.state_dict().items()}
            logged = dict(run.callback_metrics)
            result = {"rows": kept.rows, "weights": weights, "callbacks": states, "logged": logged}
            torch.save(result, folder / f"{name}-{strategy}-{rank}.pt")


def weighted_loss(module: LanguageModel, batch: dict, weights: list[float]) -> torch.Tensor:
    logits = module.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return (torch.tensor(weights)[:, None] * losses).sum() / (targets != -100).sum()


def batches_in_one_process(sampler: type | None) -> dict:
    """Batches of 16; each of two ranks has every second row."""
    module, samples = LanguageModel(lr=LR), texts(2 * 19)
    optimizer = module.configure_optimizers()
    rows: list[list] = [[], []]

    def train(indices: list[int]) -> float:
        losses = []
        for rank in (0, 1):
            mine = indices[rank::2]
            part = default_collate([samples[i] for i in (mine[:1] if len(mine) < 8 and rank == 1 else mine)])
            rows[rank].append(first_tokens(part))
            losses.append(module.training_step(part, 0))
        loss = sum(losses) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    if sampler is HardBatchSampler:
        order = torch.randperm(38, generator=torch.Generator().manual_seed(0)).repeat(2).tolist()
        slow_hard_batches(3, 0.5, lambda step, batch: train(order[16 * batch : 16 * batch + 16]), 6)
    elif sampler is DynamicDataPruningSampler:
        prune_in_one_process(module, optimizer, samples, rows)
    elif sampler is None:  # every second sample, filled up to be divided by two
        for epoch in (0, 1):
            order = np.random.default_rng((7, epoch)).permutation(np.arange(0, 38, 2)).tolist()
            order.append(order[0])
            train(order[:16]), train(order[16:])
    else:
        visits = np.zeros(38)
        for epoch in (0, 1):  # of one batch of 32 candidates
            drawn = np.random.default_rng((0, epoch)).permutation(38)[:32]
            concepts = [tags(i) for i in drawn]
            count = len(set().union(*map(tags, range(38))))
            number = {name: c for c, name in enumerate(dict.fromkeys(n for i in range(38) for n in tags(i)))}
            ids = [{number[name] for name in names} for names in concepts]
            chosen = drawn[slow_diverse(ids, 16, [max(1.0, 16 / count)] * count, 0.1 * visits[drawn], None)]
            visits[chosen] += 1
            train(chosen.tolist())
    return {"rows": rows, "weights": module.state_dict()}


def prune_in_one_process(module: LanguageModel, optimizer: Any, samples: Any, rows: list[list]) -> None:
    """The rounds of `mean`, with weights, over two epochs of three batches."""
    last, queue, number, lr = [math.nan] * 38, [], -1, optimizer.param_groups[0]["lr"]
    for _ in range(6):
        while len(queue) < 16:
            number += 1
            generators = [torch.Generator().manual_seed(2 * number + stream) for stream in (0, 1)]
            chosen = dict.fromkeys(range(38), 1.0)
            if number:
                chosen = slow_pruning("mean", last, generators[0], 0.0, number, 0.5)
            ids = sorted(chosen) if not number else [*chosen]
            queue += [(ids[i], chosen[ids[i]]) for i in torch.randperm(len(ids), generator=generators[1]).tolist()]
        batch, queue, losses = queue[:16], queue[16:], []
        for rank in (0, 1):
            mine = batch[rank::2]
            part = default_collate([samples[i] for i, _ in mine])
            rows[rank].append(first_tokens(part))
            losses.append(weighted_loss(module.train(), part, [weight for _, weight in mine]))
            for i, _ in mine:
                one = default_collate([samples[i]])
                with torch.no_grad():
                    last[i] = float(weighted_loss(module, one, [1.0]))
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.param_groups[0]["lr"] = lr * (38 / len(chosen)) ** 0.5
        optimizer.step()


def one_process(name: str) -> dict:
    """What two ranks must give: k of each rank's candidates by the memory at the start of the step."""
    if CALLBACKS[name].sampler is not None or CALLBACKS[name].cls is InstanceSelection:
        return batches_in_one_process(CALLBACKS[name].sampler)
    twin = (CALLBACKS[name].twin or UniformTwin)()
    keeps = 2 if CALLBACKS[name].curates else 8
    module, samples = LanguageModel(lr=LR), texts(2 * 19)
    optimizer = module.configure_optimizers()
    rows: list[list] = [[], []]
    step = 0
    for epoch in range(2):
        order = torch.randperm(38, generator=torch.Generator().manual_seed(7 + epoch))
        for start in range(0, 19, 8):
            losses = []
            for rank in (0, 1):
                chosen = order[rank::2][start : start + 8]
                if len(chosen) < 8 and rank == 1:
                    chosen = chosen[:1]
                batch = default_collate([samples[i] for i in chosen])
                with torch.no_grad():
                    logits = module.eval().model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
                twin.batch = batch
                scores = twin.score(step, rank, logits, batch["labels"][:, 1:])
                twin.samples = chosen.tolist()
                best, weights = twin.choose(step, rank, scores, keeps)
                twin.keep(best)
                kept = {key: value[best] for key, value in batch.items()}
                rows[rank].append(first_tokens(kept))
                losses.append(weighted_loss(module.train(), kept, weights))
            twin.end_step()
            optimizer.zero_grad()
            (sum(losses) / 2).backward()
            optimizer.step()
            step += 1
    return {"rows": rows, "weights": module.state_dict()}
