"""A few minutes on two CPU cores: utility-diversity selection against uniform selection at the same budget.

``make demo`` fine-tunes SmolLM2-135M twice from the same weights, with the same seed, the same
candidate batches and the same number of optimizer steps. It draws the learning curves and prints what each arm cost.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from curation.recipes.cli.lightning_cli import run
from curation.recipes.pictures import save_picture
from curation.recipes.sources import require_extra

RECIPE = "sft_utility_diversity"
ARMS = ("UtilityDiversitySelection", "UniformSelection")
KEEP = 0.25
STEPS, VALIDATE_EVERY = 12, 3
SIZE = ["batch_size=16", "max_length=96", "context_turns=1", "max_samples=1000", "val_samples=48"]


def run_arm(arm: str, out: Path) -> dict[str, Any]:
    """Train one arm, with its metric files under ``out/arm``.

    Args:
        arm: Name of the selection callback.
        out: Folder of the demo.

    Returns:
        The optimizer steps, the samples scored and trained on, and the training seconds.
    """
    import wandb

    (out / arm).mkdir(parents=True, exist_ok=True)  # W&B falls back to a temporary folder otherwise
    save = {"save_dir": str(out), "name": arm}
    selection = {"class_path": f"curation.callbacks.{arm}", "init_args": {"keep": KEEP}}
    loggers = [
        # CSVLogger counts versions; an empty one writes into the arm's folder itself.
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {**save, "version": ""}},
        {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "init_args": {"project": "lightning-curation", "group": "demo", "name": arm, "save_dir": str(out / arm)},
        },
    ]
    args = [
        f"--config={RECIPE}",
        f"--trainer.callbacks={json.dumps([selection])}",
        f"--trainer.logger={json.dumps(loggers)}",
        f"--trainer.max_steps={STEPS}",
        f"--trainer.val_check_interval={VALIDATE_EVERY}",
        f"--trainer.log_every_n_steps={VALIDATE_EVERY}",
        "--trainer.inference_mode=false",  # a metric reset in that mode cannot be updated by the fit that follows
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_model_summary=false",
        "--model.lr=1e-4",
        "--model.warmup_steps=4",
        *(f"--data.{option}" for option in SIZE),
    ]
    cli = run(args, execute=False)
    cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    wandb.finish()  # or the second arm would go on with the first one's run
    rule = next(c for c in cli.trainer.callbacks if type(c).__name__ == arm)
    return {
        "steps": cli.trainer.global_step,
        "scored": rule.samples_scored,
        "trained": rule.samples_trained,
        "seconds": rule.train_seconds,
    }


def read_curve(file: Path) -> list[tuple[int, float, float]]:
    """Optimizer steps, training seconds and validation loss at each validation, from a ``metrics.csv``.

    The selection logs its seconds on the steps that are validated, just before the validation.
    """
    curve: list[tuple[int, float, float]] = []
    seconds = 0.0
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            if row.get("curation/train_seconds"):
                seconds = float(row["curation/train_seconds"])
            if row.get("val_loss"):
                # Lightning numbers steps from 0, and validates before the first one under the same number.
                curve.append((int(row["step"]) + 1 if curve else 0, seconds, float(row["val_loss"])))
    return curve


def best_at(curves: dict[str, list[tuple[int, float, float]]], axis: int, place: float) -> str:
    """The arm with the lowest validation loss at a place on an axis, with linear interpolation between validations.

    Args:
        curves: The points of each arm: optimizer steps, training seconds, validation loss.
        axis: 0 for steps, 1 for seconds.
        place: The number of steps or seconds.
    """
    losses = {arm: [point[2] for point in curve] for arm, curve in curves.items()}
    return min(curves, key=lambda arm: np.interp(place, [point[axis] for point in curves[arm]], losses[arm]))


def draw(curves: dict[str, list[tuple[int, float, float]]], file: Path) -> None:
    """Validation loss against optimizer steps and against training seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        for (arm, curve), marker in zip(curves.items(), "os", strict=True):
            axes.plot([point[panel] for point in curve], [point[2] for point in curve], marker=marker, label=arm)
        axes.set_xlabel(("optimizer steps", "training seconds (scoring included)")[panel])
        axes.set_ylabel("validation loss per answer token" if panel == 0 else "")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"SmolLM2-135M on chitchat, {KEEP:.0%} of each candidate batch kept, one seed")
    save_picture(figure, file)


def main(args: list[str] | None = None) -> None:
    """Run both arms, draw, and print the table."""
    parser = argparse.ArgumentParser("python -m curation.recipes.cli.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs (%(default)s)")
    out = parser.parse_args(args).out
    require_extra()
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=SIMPLE,
        collapse_padding=True,
        pad_edge=False,
        title="The same weights, seed, candidate batches and steps",
        caption="samples scored and trained on, training seconds, validation loss",
    )
    table.add_column("arm", no_wrap=True)
    for column in ("steps", "scored", "trained", "seconds", "before", "after"):
        table.add_column(column, justify="right")
    curves = {}
    for arm in ARMS:
        row = run_arm(arm, out)
        curves[arm] = read_curve(out / arm / "metrics.csv")
        before, after = curves[arm][0][2], curves[arm][-1][2]
        counts = (row["steps"], row["scored"], row["trained"], f"{row['seconds']:.0f}")
        table.add_row(arm, *map(str, counts), f"{before:.3f}", f"{after:.3f}")
    draw(curves, out / "learning_curves.png")
    console = Console()
    console.print(table)
    seconds = min(curve[-1][1] for curve in curves.values())
    console.print(
        f"Lower validation loss after equal steps: {best_at(curves, 0, STEPS)}; after equal seconds ({seconds:.0f}): "
        f"{best_at(curves, 1, seconds)}. One seed is no evidence of a difference.\n"
        f"Curves: {out / 'learning_curves.png'}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
