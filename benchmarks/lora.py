"""Adapters (LoRA) against all weights: validation loss, memory and optimizer state of fine-tuning on chat.

    python benchmarks/lora.py                 # SmolLM2-135M cut to 6 layers, 40 steps; one line of JSON a fit

Every fit is a process of its own, whose peak resident memory is that of the fit with its libraries and data. The best
learning rate of each arm on another seed: ``--fit='["full", 1e-3, 1]'``.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from curation.recipes.chat import Conversations, SupervisedFineTuning

STEPS, LAYERS = 40, 6
ARMS: dict[str, Any] = {
    "full": None,
    "rank 8": {"rank": 8, "targets": ["q_proj", "v_proj"], "alpha": 16},
    "rank 8, all layers": {
        "rank": 8,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "alpha": 16,
    },
}
GRID = {
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
    "rank 8": (1e-3, 3e-3, 1e-2, 3e-2),
    "rank 8, all layers": (1e-3, 3e-3, 1e-2, 3e-2),
}


def measure(arm: str, lr: float, seed: int) -> dict[str, Any]:
    """One fit on 8 rows of at most 64 tokens a step, and what it cost."""
    seed_everything(seed, verbose=False)
    module = SupervisedFineTuning(num_layers=LAYERS, lr=lr, warmup_steps=5, lora=ARMS[arm])
    data = Conversations(
        batch_size=8, max_length=64, context_turns=1, max_samples=16 * STEPS, val_samples=192, seed=seed
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, val_check_interval=STEPS, logger=False,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, inference_mode=False,
    )  # fmt: skip
    before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    start = time.perf_counter()
    trainer.fit(module, data)
    states = trainer.optimizers[0].state.values()
    held = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        "arm": arm,
        "lr": lr,
        "seed": seed,
        "val_loss": [round(before, 4), round(float(trainer.callback_metrics["val_loss"]), 4)],
        "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "weights": sum(p.numel() for p in module.parameters()),
        "optimizer_bytes": sum(value.nbytes for value in held),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "rows": len(data.train),
        "validated": len(data.val),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Run every fit in a process of its own, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--fit", help="one fit, as JSON [arm, lr, seed]")
    options = parser.parse_args()
    if options.fit:
        print(json.dumps(measure(*json.loads(options.fit))), flush=True)
        return
    for seed in range(options.seeds):
        for arm, rates in GRID.items():
            for lr in rates:
                subprocess.run([sys.executable, __file__, f"--fit={json.dumps([arm, lr, seed])}"], check=True)


if __name__ == "__main__":
    main()
