"""The pass rate of a policy on every prompt, how long its answers are, and how many seconds they take."""

import time
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Subset

from curation.recipes.rollouts.answers import Rollouts
from curation.recipes.rollouts.policy import PolicyModule
from curation.recipes.rollouts.prompts import Prompts
from curation.records.prompt_memory import PromptMemory


class _Profile(Callback):
    """Enters the answers to every batch, and replaces the file."""

    def __init__(
        self, memory: PromptMemory, more: dict[str, np.ndarray], answers: int, save: Callable[[], None]
    ) -> None:
        self.memory, self.more, self.answers, self.save = memory, more, answers, save
        self.began = 0.0

    def on_predict_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Rollouts, batch: Any, *args: Any
    ) -> None:
        """Enter the answers."""
        ids, index = batch["ids"].cpu(), outputs.prompt_index
        rewards = torch.zeros(len(ids)).index_add_(0, index, outputs.rewards)
        tokens = torch.zeros(len(ids)).index_add_(0, index, outputs.completions.lengths.cpu().float())
        self.memory.update(ids, 1 - rewards / self.answers, self.answers, 0)
        self.more["length"][ids] = tokens / self.answers
        self.more["seconds"][ids] = tokens / tokens.sum() * (time.perf_counter() - self.began)
        self.save()


def profile(
    trainer: Trainer,
    module: PolicyModule,
    data: Prompts,
    path: str | PathLike[str],
    ckpt_path: str | None = None,
    settings: str = "",
) -> PromptMemory:
    """Answer every training prompt ``rollouts`` times and write a memory, which the sampler's ``start`` reads.

    Beside the columns of the memory the file has ``length``, the mean number of tokens of an answer, and ``seconds``,
    those of the batch of the prompt in proportion to its tokens. It is replaced after every batch, so a killed
    process loses one batch at most; where the file is there and not whole, the prompts that it lacks are answered.

    Args:
        trainer: The trainer, of one process.
        module: The policy.
        data: Its prompts.
        path: The Parquet file.
        ckpt_path: Checkpoint of the policy; None for the model as the recipe makes it, without warm-up.
        settings: How the answers are made; a file with other settings is not gone on with.

    Raises:
        ValueError: If there are several processes, or the file is one of other prompts or settings.
        FileExistsError: If the file is whole.
    """
    if trainer.world_size > 1:
        raise ValueError(f"Argument `--trainer.devices` must be 1 for a profile, but got {trainer.world_size}.")
    if module.hparams["warmup_steps"] and ckpt_path is None:
        rank_zero_warn("The profile is of the model without its warm-up; --ckpt_path takes one that is trained.")
    prompts = data.prompts
    memory = PromptMemory(len(prompts))
    more = {name: np.full(len(prompts), np.nan, np.float32) for name in ("length", "seconds")}
    if Path(path).exists():
        table = memory.read(path, prompts.fingerprint)
        if (table.schema.metadata or {}).get(b"settings", b"").decode() != settings:
            raise ValueError(
                f"Argument `--output` must name a file of the same settings, but {str(path)!r} has others."
            )
        if bool(memory.visits.all()):
            raise FileExistsError(f"Argument `--output` must name a new file, but {str(path)!r} exists.")
        more = {name: table[name].to_numpy().copy() for name in more}
    left = (memory.visits == 0).nonzero()[:, 0].tolist()
    loader = data.predict_dataloader()
    part = DataLoader(Subset(loader.dataset, left), loader.batch_size, collate_fn=loader.collate_fn)
    data.predict_dataloader = lambda: part  # type: ignore[method-assign]
    save = partial(memory.save, path, prompts.fingerprint, settings, **more)
    callback = _Profile(memory, more, module.hparams["rollouts"], save)
    trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    trainer.predict(module, datamodule=data, ckpt_path=ckpt_path, return_predictions=False)
    return memory
