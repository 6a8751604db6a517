"""A picture of the fraction of prompts that a policy solves, by the rollouts spent."""

import re
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loggers import log_image
from curation.checks import check_path
from curation.files import replacing
from curation.recipes.pictures import picture

PARTS = {
    "val": ("held out", "C0", "-"),
    "val_hard": ("held out, hardest", "C3", "-"),
    "seen": ("trained on", "C0", ":"),
    "seen_hard": ("trained on, hardest", "C3", ":"),
}


class SolvePicture(FitCallback):
    """Draws pass@1 and pass@k of a :class:`~curation.recipes.rollouts.PolicyModule` at the end of a fit.

    With ``Trainer(num_sanity_val_steps=-1)`` the curves begin before the first step.

    Args:
        path: Path of the PNG file; in W&B the picture is ``rollouts/solved``.

    Raises:
        ValueError: If ``path`` is not a path.

    Example:
        >>> SolvePicture("runs/solved.png").path
        'runs/solved.png'
    """

    def __init__(self, path: str) -> None:
        self.path: str = check_path("path", path)
        self.points: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the points of an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self.points = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to each curve."""
        partial = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        if not partial and trainer.training is False and trainer.state.fn == "fit":
            rates = {name: float(rate) for name, rate in trainer.callback_metrics.items() if "_pass_at_" in name}
            if not rates:  # in a run that logs nothing
                return
            self.points.append({"rollouts": float(pl_module.rollouts_made), **rates})  # type: ignore[arg-type]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on rank 0."""
        if not self.points or not trainer.is_global_zero:
            return
        figure = draw(self.points)
        with replacing(self.path) as file:
            file.write_bytes(picture(figure, "png"))
        log_image(trainer, "rollouts/solved", figure)

    def state_dict(self) -> dict[str, Any]:
        """The points of the curves."""
        return {"points": self.points}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the points of a checkpoint."""
        self.points = list(state["points"])


def draw(points: list[dict[str, float]]) -> Any:
    """A figure with a panel for each k, and a curve for each part of the prompts.

    Args:
        points: The points of the curves: ``rollouts``, and ``PART_pass_at_K`` for some parts and k.
    """
    from matplotlib.figure import Figure

    ks = sorted({int(match[1]) for name in points[-1] if (match := re.search(r"_pass_at_(\d+)$", name))})
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
    panels[0].set_ylabel("fraction of the prompts")
    panels[-1].legend(frameon=False)
    return figure
