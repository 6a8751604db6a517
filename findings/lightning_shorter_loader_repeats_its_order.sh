#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0: under DDP the shorter of two training data loaders goes through its samples in one order
# again and again within an epoch. `CombinedLoader(..., "max_size_cycle")`, the default for several training data loaders,
# begins the shorter one again when it is through. With `shuffle=True` on one device every such pass has an order of its
# own. Under DDP Lightning puts a DistributedSampler in its place, whose documentation says that the order is the same
# until `set_epoch` is called, and calls that once an epoch: all passes of an epoch have the same batches. No warning tells.
# Seen: "orders of the short loader in 4 passes of an epoch: 4 on one process, 1 on two".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lightning==2.6.6 torch==2.13.0
cd "$folder"
cat > fit.py <<'PYTHON'
import json
import logging
import sys
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += batch["short"].tolist()
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    processes = int(sys.argv[1])
    seed_everything(0, verbose=False)
    module = Module()
    loaders = {name: DataLoader(range(n * processes), 4, shuffle=True) for name, n in {"long": 64, "short": 16}.items()}
    Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loaders)
    if module.global_rank == 0:
        passes = [tuple(module.seen[i : i + 16]) for i in range(0, len(module.seen), 16)]
        print(json.dumps([len(passes), len(set(passes))]))
PYTHON
one=$(venv/bin/python fit.py 1 | tail -n 1)
two=$(venv/bin/python fit.py 2 | tail -n 1)
venv/bin/python - "$one" "$two" <<'PYTHON'
import json
import sys

(passes, one), (_, two) = map(json.loads, sys.argv[1:])
print(f"orders of the short loader in {passes} passes of an epoch: {one} on one process, {two} on two")
assert (passes, one, two) == (4, 4, 1)
PYTHON
