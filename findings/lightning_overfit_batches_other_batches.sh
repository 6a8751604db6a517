#!/usr/bin/env bash
# lightning 2.6.6: `Trainer(overfit_batches=2)` does not repeat two batches where the data loader has a batch sampler.
# For a `RandomSampler` Lightning puts a sequential one in its place and warns. A loader made with `batch_sampler=` has
# no sampler of its own to replace (its attribute `sampler` is a sequential one that nobody draws from), so the check
# is satisfied: no replacement, no warning, and every epoch trains on the first two batches of another order. A model
# that cannot overfit then looks broken.
# Seen: "sampler: 2 batches in 4 epochs; batch sampler: 8 batches in 4 epochs, warnings 0"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 lightning==2.6.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.seen = set()

    def training_step(self, batch, batch_idx):
        self.seen.add(tuple(batch.flatten().tolist()))
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches(loader):
    torch.manual_seed(0)
    module = Net()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(overfit_batches=2, max_epochs=4, accelerator="cpu", **quiet).fit(module, loader)
    return len(module.seen), sum("overfit" in str(w.message) for w in caught)


data = torch.arange(64.0)[:, None]
sampler, told = batches(DataLoader(data, batch_size=4, sampler=RandomSampler(data)))
batch_sampler, warned = batches(DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)))
print(f"sampler: {sampler} batches in 4 epochs; batch sampler: {batch_sampler} batches in 4 epochs, warnings {warned}")
assert (sampler, told) == (2, 1)
assert (batch_sampler, warned) == (8, 0)
PYTHON
