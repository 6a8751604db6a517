"""Does utility-diversity selection help, and which of its parts: an ablation on a real SFT set, paired by seed.

``python benchmarks/ablation_sft.py`` fine-tunes SmolLM2-135M on chitchat conversations with every arm, keep ratio and
seed, at equal optimizer steps and equal samples trained on. The learning rate is tuned for ``uniform``, the baseline,
at every keep ratio with a seed that is not used afterwards. Results go to
``docs/results/utility_diversity_ablation.json``; finished runs in it are not run again. ``--report`` only prints.
"""

import argparse
import copy
import gc
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from curation.callbacks import OnlineSelection, UniformSelection, UtilityDiversitySelection
from curation.evaluation.statistics import paired_interval
from curation.online.utility_diversity import UtilityDiversityScorer
from curation.scoring import IGNORED

OUT = Path(__file__).parent.parent / "docs" / "results" / "utility_diversity_ablation.json"
BATCH, MAX_LENGTH, STEPS = 8, 64, 30
KEEPS, SEEDS = (0.125, 0.25, 0.5), (0, 1, 2, 3, 4)
RATES, TUNING_SEED = (1e-5, 3e-5, 1e-4), 100
NORMALIZATION_KEEP = 0.25


class DiversityOnly(UtilityDiversityScorer):
    """The rule without its utility."""

    def _utility(self, rows: Tensor, counts: Tensor) -> Tensor:
        return torch.zeros(len(rows), device=rows.device)


class PerToken(UtilityDiversityScorer):
    """The nuclear norm divided by the number of tokens, instead of by its trend."""

    def _utility(self, rows: Tensor, counts: Tensor) -> Tensor:
        return super()._utility(rows, counts) / counts.clamp(min=1)


class Variant(UtilityDiversitySelection):
    """The rule with another scorer."""

    def __init__(self, scorer: type[UtilityDiversityScorer], **arguments: Any) -> None:
        self.scorer_type = scorer
        super().__init__(head="none", **arguments)

    def _reset(self) -> None:
        super()._reset()
        self.scorer = self.scorer_type(self.alpha, self.normalization, self.seed)


class Tokens(Callback):
    """Counts the answer tokens trained on."""

    count = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count."""
        self.count += int(batch["labels"].ne(IGNORED).sum())


Rule = Callable[[float, int], OnlineSelection]
ARMS: dict[str, Rule] = {
    "uniform": lambda keep, seed: UniformSelection(keep=keep, seed=seed),
    "nuclear norm": lambda keep, seed: UtilityDiversitySelection(keep=keep, seed=seed, alpha=0.0),
    "diversity": lambda keep, seed: Variant(DiversityOnly, keep=keep, seed=seed),
    "both": lambda keep, seed: UtilityDiversitySelection(keep=keep, seed=seed),
}
NORMALIZATIONS: dict[str, Rule] = {
    "both, per token": lambda keep, seed: Variant(PerToken, keep=keep, seed=seed, normalization="none"),
    "both, raw": lambda keep, seed: UtilityDiversitySelection(keep=keep, seed=seed, normalization="none"),
    "both, paper": lambda keep, seed: UtilityDiversitySelection(keep=keep, seed=seed, normalization="paper"),
}

_model: Any = None
_data: Any = None


def run(job: tuple[str, float, float, int]) -> dict[str, Any]:
    """Fit once; return the validation loss per answer token at its end."""
    from curation.recipes.chat import Conversations, SupervisedFineTuning
    from curation.recipes.smollm2 import SMOLLM2

    global _model, _data
    arm, keep, lr, seed = job
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if _model is None:
        _model = SupervisedFineTuning(SMOLLM2, warmup_steps=5)
        _model.configure_model()
        _data = Conversations("chitchat", batch_size=BATCH, max_length=MAX_LENGTH, context_turns=1, val_samples=96)
        _data.setup("fit")
    seed_everything(seed, verbose=False)  # the order of the candidates is the same for every arm
    module = copy.deepcopy(_model)
    module.hparams["lr"] = lr
    rule = (ARMS | NORMALIZATIONS)[arm](keep, seed)
    tokens = Tokens()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        limit_val_batches=0,
        callbacks=[rule, tokens],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=_data)
    trainer.limit_val_batches = 1.0
    (result,) = trainer.validate(module, datamodule=_data, verbose=False)
    del trainer, module
    gc.collect()  # trainer and module hold each other, and gigabytes
    return {
        "arm": arm,
        "keep": keep,
        "lr": lr,
        "seed": seed,
        "val_loss": result["val_loss"],
        "tokens_trained": tokens.count,
        "samples_trained": rule.samples_trained,
        "samples_scored": rule.samples_scored,
    }


def fits(jobs: list[tuple[str, float, float, int]], results: list[dict[str, Any]]) -> None:
    """Run the jobs that are not in the results yet."""
    done = {(r["arm"], r["keep"], r["lr"], r["seed"]) for r in results}
    jobs = [job for job in jobs if job not in done]
    if not jobs:
        return
    from rich.progress import track

    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for result in track(pool.imap_unordered(run, jobs), "fits", len(jobs)):
            results.append(result)
            OUT.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")


def best_rate(results: list[dict[str, Any]], keep: float) -> float:
    """The learning rate with the lowest loss of ``uniform`` on the tuning seed."""
    tuning = [r for r in results if r["seed"] == TUNING_SEED and r["keep"] == keep]
    return min(tuning, key=lambda r: r["val_loss"])["lr"]


def report(results: list[dict[str, Any]]) -> None:
    """Mean loss of each arm, and its paired difference to ``uniform`` with a 95 % t interval."""
    print("| keep | learning rate | arm | seeds | tokens trained | validation loss | minus uniform, paired (95 %) |")
    print("|---" * 7 + "|")
    for keep in KEEPS:
        lr = best_rate(results, keep)
        runs = {(r["arm"], r["seed"]): r for r in results if r["keep"] == keep and r["seed"] in SEEDS}
        for arm in ARMS | NORMALIZATIONS:
            pairs = [(runs[arm, s], runs["uniform", s]) for s in SEEDS if (arm, s) in runs and ("uniform", s) in runs]
            if len(pairs) < 3:
                continue
            tokens, loss = (statistics.mean(r[key] for r, _ in pairs) for key in ("tokens_trained", "val_loss"))
            differences = [selected["val_loss"] - uniform["val_loss"] for selected, uniform in pairs]
            mean, low, _ = paired_interval(differences)
            gap = "" if arm == "uniform" else f"{mean:+.3f} ± {mean - low:.3f}"
            print(f"| {keep} | {lr:g} | {arm} | {len(pairs)} | {tokens:.0f} | {loss:.3f} | {gap} |")


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="only print the table of the finished runs")
    only_report = parser.parse_args().report
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = json.loads(OUT.read_text()) if OUT.exists() else []
    if not only_report:
        fits([("uniform", keep, lr, TUNING_SEED) for keep in KEEPS for lr in RATES], results)
        rates = {keep: best_rate(results, keep) for keep in KEEPS}
        arms = [(keep, arm) for keep in KEEPS for arm in ARMS] + [(NORMALIZATION_KEEP, arm) for arm in NORMALIZATIONS]
        fits([(arm, keep, rates[keep], seed) for seed, (keep, arm) in itertools.product(SEEDS, arms)], results)
    report(results)


if __name__ == "__main__":
    main()
