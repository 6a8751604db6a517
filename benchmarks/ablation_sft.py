"""Does utility-diversity selection help, and which of its terms: an ablation on a real SFT set, paired by seed.

``python benchmarks/ablation_sft.py`` fine-tunes SmolLM2-135M on chitchat conversations with every
arm, keep ratio and seed, at equal optimizer steps and equal samples trained on. The learning rate is tuned for
``uniform``, the baseline, at keep 0.25 with a seed that is not used afterwards. Results go to
``docs/results/utility_diversity_ablation.json``; finished runs in it are not run again. ``--report`` only prints.
"""

import argparse
import copy
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from curation.callbacks import OnlineSelection, UniformSelection, UtilityDiversitySelection
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

OUT = Path(__file__).parent.parent / "docs" / "results" / "utility_diversity_ablation.json"
BATCH, MAX_LENGTH, STEPS = 8, 64, 20
KEEPS, SEEDS = (0.125, 0.25, 0.5), (0, 1, 2, 3, 4)
RATES, TUNING_SEED, TUNING_KEEP = (3e-5, 1e-4, 3e-4), 100, 0.25
T_975 = {3: 4.303, 4: 3.182, 5: 2.776}


class DiversityOnly(UtilityDiversitySelection):
    """The rule without its utility."""

    def _utility(self, rows: Tensor, counts: Tensor) -> Tensor:
        return torch.zeros(len(rows), device=rows.device)


ARMS: dict[str, Any] = {
    "uniform": UniformSelection,
    "nuclear norm": lambda keep, seed: UtilityDiversitySelection(keep=keep, seed=seed, alpha=0.0),
    "diversity": lambda keep, seed: DiversityOnly(keep=keep, seed=seed),
    "both": lambda keep, seed: UtilityDiversitySelection(keep=keep, seed=seed),
}

_model: Any = None
_data: Any = None


def run(job: tuple[str, float, float, int]) -> dict[str, Any]:
    """One fit; the validation loss per answer token at its end."""
    from curation.recipes.sft import Conversations, SupervisedFineTuning

    global _model, _data
    arm, keep, lr, seed = job
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if _model is None:
        _model = SupervisedFineTuning(warmup_steps=5)
        _model.configure_model()
        _data = Conversations(batch_size=BATCH, max_length=MAX_LENGTH, context_turns=1, val_samples=96)
        _data.setup("fit")
    seed_everything(seed, verbose=False)  # the order of the candidates is the same for every arm
    module = copy.deepcopy(_model)
    module.hparams["lr"] = lr
    rule: OnlineSelection = ARMS[arm](keep=keep, seed=seed)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        limit_val_batches=0,
        callbacks=[rule],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=_data)
    trainer.limit_val_batches = 1.0
    (result,) = trainer.validate(module, datamodule=_data, verbose=False)
    return {
        "arm": arm,
        "keep": keep,
        "lr": lr,
        "seed": seed,
        "val_loss": result["val_loss"],
        "samples_trained": rule.samples_trained,
        "samples_scored": rule.samples_scored,
    }


def run_all(jobs: list[tuple[str, float, float, int]], results: list[dict[str, Any]]) -> None:
    """Run what is not in the results yet, and write them after every run."""
    from rich.progress import track

    done = {(r["arm"], r["keep"], r["lr"], r["seed"]) for r in results}
    todo = [job for job in jobs if job not in done]
    if not todo:
        return
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for result in track(pool.imap_unordered(run, todo), "fits", len(todo)):
            results.append(result)
            OUT.parent.mkdir(exist_ok=True)
            OUT.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")


def best_rate(results: list[dict[str, Any]]) -> float:
    """The learning rate with the lowest loss of ``uniform`` on the tuning seed."""
    return min((r for r in results if r["seed"] == TUNING_SEED), key=lambda r: r["val_loss"])["lr"]


def report(results: list[dict[str, Any]]) -> None:
    """Mean loss of each arm, and its paired difference to ``uniform`` with a 95 % t interval."""
    lr = best_rate(results)
    print("| keep | learning rate | arm | validation loss | minus uniform, paired (95 %) |\n|---|---|---|---|---|")
    for keep in KEEPS:
        losses = {
            arm: {r["seed"]: r["val_loss"] for r in results if (r["arm"], r["keep"], r["lr"]) == (arm, keep, lr)}
            for arm in ARMS
        }
        for arm, by_seed in losses.items():
            seeds = [s for s in SEEDS if all(s in of_arm for of_arm in losses.values())]
            mean = statistics.mean(by_seed[s] for s in seeds)
            differences = [by_seed[s] - losses["uniform"][s] for s in seeds]
            half = T_975[len(seeds)] * statistics.stdev(differences) / len(seeds) ** 0.5
            gap = "" if arm == "uniform" else f"{statistics.mean(differences):+.3f} ± {half:.3f}"
            print(f"| {keep} | {lr:g} | {arm} | {mean:.3f} | {gap} |")


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="only print the table of the results there are")
    only_report = parser.parse_args().report
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = json.loads(OUT.read_text()) if OUT.exists() else []
    if not only_report:
        run_all([("uniform", TUNING_KEEP, lr, TUNING_SEED) for lr in RATES], results)
        lr = best_rate(results)
        run_all([(arm, keep, lr, s) for s, keep, arm in itertools.product(SEEDS, KEEPS, ARMS)], results)
    report(results)


if __name__ == "__main__":
    main()
