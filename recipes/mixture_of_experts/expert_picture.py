"""Heat maps of the experts of a mixture: how often each layer, and each domain, chooses them."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from curation.recipes.pictures import picture


class ExpertPicture(Callback):
    """Draws what the last validation of a fit saw of a :class:`~curation.recipes.mixture_of_experts.MixtureLM`.

    Args:
        path: Of the PNG; in W&B it is ``experts/heat_maps``.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.frequencies: Tensor | None = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the shares, before the module forgets them."""
        metrics: Any = pl_module.specializations
        self.frequencies = torch.stack([metric.compute()["frequencies"] for metric in metrics]).cpu()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on rank 0."""
        if self.frequencies is None or not trainer.is_global_zero:
            return
        figure = draw(self.frequencies, trainer.datamodule.names)  # type: ignore[attr-defined]
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        Path(self.path).write_bytes(picture(figure, "png"))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("experts/heat_maps", [figure])


def draw(frequencies: Tensor, names: list[str]) -> Any:
    """Layer by expert, and domain by expert in each layer.

    Args:
        frequencies: ``[L, D, E]``: shares of the choices of a domain in a layer, which sum to 1.
        names: Of the domains.
    """
    from matplotlib.figure import Figure

    layers, _, experts = frequencies.shape
    loads = (experts * frequencies).numpy()
    figure = Figure(figsize=(4 * (layers + 1), 3.6), layout="constrained")
    panels = figure.subplots(1, layers + 1)
    how = {"cmap": "viridis", "vmin": 0, "vmax": max(2.0, float(loads.max())), "aspect": "auto"}
    for i, panel in enumerate(panels):
        image = panel.imshow(loads.mean(1) if i == 0 else loads[i - 1], **how)
        panel.set_title("all domains alike" if i == 0 else f"layer {i - 1}", loc="left")
        panel.set(xlabel="expert", yticks=range(layers if i == 0 else len(names)))
        panel.locator_params(axis="x", integer=True)
        panel.set_yticklabels([f"layer {layer}" for layer in range(layers)] if i == 0 else names if i == 1 else [])
    figure.colorbar(image, ax=panels, label="chosen, times the average expert", fraction=0.02, pad=0.01)
    return figure
