"""How many prompts a policy solves, against the rollouts it has spent."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from curation.recipes.pictures import picture

PARTS = {
    "val": ("held out", "C0", "-"),
    "val_hard": ("held out, hardest", "C3", "-"),
    "seen": ("trained on", "C0", ":"),
    "seen_hard": ("trained on, hardest", "C3", ":"),
}


class SolvePicture(Callback):
    """Draws pass@1 and pass@k of a :class:`~curation.recipes.rollouts.policy.PolicyModule` at the end of a fit.

    With ``Trainer(num_sanity_val_steps=-1)`` curves begin before the first step.

    Args:
        path: Of the PNG; in W&B it is ``rollouts/solved``.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.points: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew."""
        if stage == "fit":
            self.points = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a point for each curve."""
        partial = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        if not partial and trainer.training is False and trainer.state.fn == "fit":
            solved = {name: float(v) for name, v in trainer.callback_metrics.items() if "_pass_at_" in name}
            if not solved:  # in a run that logs nothing
                return
            self.points.append({"rollouts": float(pl_module.rollouts_made), **solved})  # type: ignore[arg-type]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on rank 0."""
        if not self.points or not trainer.is_global_zero:
            return
        figure = draw(self.points)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        Path(self.path).write_bytes(picture(figure, "png"))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("rollouts/solved", [figure])

    def state_dict(self) -> dict[str, Any]:
        """The points."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.points = list(state_dict["points"])


def draw(points: list[dict[str, float]]) -> Any:
    """Curves of every part, a panel for each k.

    Args:
        points: ``rollouts``, and ``PART_pass_at_K`` for some parts and k.
    """
    from matplotlib.figure import Figure

    ks = sorted({int(found[1]) for name in points[-1] if (found := re.search(r"_pass_at_(\d+)$", name))})
    figure = Figure(figsize=(5 * len(ks), 3.8), layout="constrained")
    panels = figure.subplots(1, len(ks), sharey=True, squeeze=False)[0]
    for k, panel in zip(ks, panels, strict=True):
        for part, (label, colour, style) in PARTS.items():
            curve = [(p["rollouts"], p[f"{part}_pass_at_{k}"]) for p in points if f"{part}_pass_at_{k}" in p]
            if curve:
                panel.plot(*zip(*curve, strict=True), style, color=colour, label=label, marker=".")
        panel.set_title(f"pass@{k}", loc="left")
        panel.set(xlabel="rollouts spent", ylim=(0, 1))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("share of the prompts")
    panels[-1].legend(frameon=False)
    return figure
