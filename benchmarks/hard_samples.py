"""Do hard samples help? Fashion-MNIST with 40 % wrong labels for the online rules, clean for the delta rule.

``python benchmarks/hard_samples.py`` runs both parts (or name ``noise`` or ``delta``), every arm and seed, at equal
numbers of optimizer steps. The learning rate is tuned for the baseline of each part, with a seed that is not used
afterwards, and every arm takes it. Results go to ``docs/results/hard_samples.json``; finished runs in it are not run
again. ``--report`` only prints.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from curation.callbacks import HardBatchTraining, HardSampleSelection, UniformSelection
from curation.recipes.images import FASHION_MNIST, CorruptedShare, ImageClassifier, Images
from curation.recipes.irreducible import irreducible_losses
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from paired import interval, load, run_all

OUT = Path(__file__).parent.parent / "docs" / "results" / "hard_samples.json"
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
RATES = (3e-4, 1e-3, 3e-3)

NOISE, HOLDOUT, CANDIDATES, KEEP, NOISE_STEPS = 0.4, 0.2, 320, 0.1, 1000
AS_LONG = "uniform, 3.5 times the steps"  # about as many seconds as a rule that scores
SELECTIONS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "top loss": {"rule": "top"},
    "rank": {"rule": "rank"},
    "cdf (Selective-Backprop)": {"rule": "cdf"},
    "importance": {"rule": "importance", "score": "grad_norm"},
    "reducible loss": {"rule": "top", "score": "reducible_loss"},
    "reducible loss, held-out labels as wrong": {"rule": "top", "score": "reducible_loss"},
    AS_LONG: {},
    "full": {},
}
BATCH, DELTA_EPOCHS = 128, 5
DELTAS: dict[str, float | None] = {"shuffled": None, "delta 1": 1.0, "delta 0.8": 0.8, "delta 0.5": 0.5}
BASELINE = {"noise": "uniform", "delta": "shuffled"}


def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    """A silent one."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), num_sanity_val_steps=0, **{**quiet, **kwargs})


def irreducible(data: str, seed: int, holdout_noise: float) -> str:
    """The losses of the training set by a model of the held-out images."""
    folder = tempfile.mkdtemp()
    seed_everything(seed, verbose=False)
    noisy = {"data": data, "label_noise": NOISE, "holdout": HOLDOUT, "holdout_noise": holdout_noise, "seed": seed}
    held_out = trainer(ModelCheckpoint(folder, save_last=True), max_steps=600, limit_val_batches=0)
    held_out.fit(ImageClassifier(), datamodule=Images(batch_size=32, swap=True, **noisy))
    table = irreducible_losses(
        trainer(enable_checkpointing=False),
        ImageClassifier(),
        Images(batch_size=1000, **noisy),
        f"{folder}/last.ckpt",
    )
    torch.save(table, f"{folder}/irreducible.pt")
    return f"{folder}/irreducible.pt"


def run(job: tuple[str, str, float, int, str]) -> dict[str, Any]:
    """One fit; the test accuracy at its end."""
    part, arm, lr, seed, folder = job
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    shares = CorruptedShare()
    if part == "noise":
        options = dict(SELECTIONS[arm])
        if options.get("score") == "reducible_loss":
            options["irreducible"] = irreducible(folder, seed, NOISE if "as wrong" in arm else 0.0)
        selection = (HardSampleSelection if options else UniformSelection)(
            keep=1.0 if arm == "full" else KEEP, seed=seed, **options
        )
        data = Images(folder, label_noise=NOISE, holdout=HOLDOUT, batch_size=CANDIDATES, seed=seed)
        callbacks, length = [selection, shares], {"max_steps": int(NOISE_STEPS * (3.5 if arm == AS_LONG else 1))}
    else:
        data = Images(folder, batch_size=BATCH, delta=DELTAS[arm], seed=seed)
        callbacks = [HardBatchTraining()] if DELTAS[arm] else []
        length = {"max_epochs": DELTA_EPOCHS}
    seed_everything(seed, verbose=False)
    module = ImageClassifier(lr=lr)
    one = trainer(*callbacks, limit_val_batches=0, enable_checkpointing=False, **length)
    start = time.perf_counter()
    one.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    (result,) = one.test(module, datamodule=data, verbose=False)
    kept, rows, _, _ = shares._sums.tolist() if shares._sums is not None else (0, 1, 0, 0)
    return {
        "part": part, "arm": arm, "lr": lr, "seed": seed, "accuracy": result["test_accuracy"],
        "wrong_labels": kept / rows, "steps": one.global_step, "seconds": round(seconds, 1),
    }  # fmt: skip


def fits(jobs: list[tuple[str, str, float, int]], results: list[dict[str, Any]], folder: str) -> None:
    """Run what is not in the results yet."""
    done = {(r["part"], r["arm"], r["lr"], r["seed"]) for r in results}
    run_all(run, [(*job, folder) for job in jobs if job not in done], results, OUT)


def best_rate(results: list[dict[str, Any]], part: str) -> float:
    """The learning rate with the highest accuracy of the baseline on the tuning seed."""
    tuning = [r for r in results if r["seed"] == TUNING_SEED and r["part"] == part]
    return max(tuning, key=lambda r: r["accuracy"])["lr"]


def report(results: list[dict[str, Any]], part: str) -> None:
    """Mean accuracy of each arm, and its paired difference to the baseline with a 95 % t interval."""
    base = BASELINE[part]
    runs = {(r["arm"], r["seed"]): r for r in results if r["part"] == part and r["seed"] in SEEDS}
    print(f"\n## {part}: learning rate {best_rate(results, part):g}, {runs[base, SEEDS[0]]['steps']} steps\n")
    print(f"| arm | seeds | wrong labels trained on | seconds | accuracy | minus {base}, paired (95 %) |")
    print("|---" * 6 + "|")
    for arm in SELECTIONS if part == "noise" else DELTAS:
        pairs = [(runs[arm, s], runs[base, s]) for s in SEEDS if (arm, s) in runs and (base, s) in runs]
        if len(pairs) < 3:
            continue
        accuracy, wrong, seconds = (
            statistics.mean(r[key] for r, _ in pairs) for key in ("accuracy", "wrong_labels", "seconds")
        )
        differences = [ours["accuracy"] - other["accuracy"] for ours, other in pairs]
        mean, half = interval(differences)
        gap = "" if arm == base else f"{mean:+.2%} ± {half:.2%}"
        share = f"{wrong:.1%}" if part == "noise" else ""
        print(f"| {arm} | {len(pairs)} | {share} | {seconds:.0f} | {accuracy:.2%} | {gap} |")


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["noise", "delta"])
    parser.add_argument("--data", default=FASHION_MNIST, help="folder with the four idx files")
    parser.add_argument("--report", action="store_true", help="only print the tables of the results there are")
    options = parser.parse_args()
    results = load(OUT)
    for part in options.parts:
        if not options.report:
            fits([(part, BASELINE[part], lr, TUNING_SEED) for lr in RATES], results, options.data)
            arms = list(SELECTIONS if part == "noise" else DELTAS)
            jobs = [(part, arm, best_rate(results, part), s) for s, arm in itertools.product(SEEDS, arms)]
            fits(jobs, results, options.data)
        report(results, part)


if __name__ == "__main__":
    main()
