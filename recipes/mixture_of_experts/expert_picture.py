"""Heat maps of the experts of a mixture: how often each layer, and each domain, chooses them."""

from os import PathLike
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from curation.callbacks.lightning.loggers import log_image
from curation.checks import check_text
from curation.files import replacing
from curation.recipes.pictures import picture


class ExpertPicture(Callback):
    """Draws how the last validation of a fit used the experts of a mixture.

    The module is a :class:`~curation.recipes.mixture_of_experts.MixtureLM`, or has its ``specializations``. In W&B
    the picture is ``experts/heat_maps``.

    Args:
        path: The PNG file to write.

    Raises:
        ValueError: If ``path`` is no path.

    Example:
        >>> ExpertPicture("runs/experts.png").path
        'runs/experts.png'
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = path if isinstance(path, PathLike) else check_text("path", path)
        self.frequencies: Tensor | None = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the fractions before the module resets its metrics."""
        metrics: Any = pl_module.specializations
        self.frequencies = torch.stack([metric.compute()["frequencies"] for metric in metrics]).cpu()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on rank 0."""
        if self.frequencies is None or not trainer.is_global_zero:
            return
        figure = draw(self.frequencies, trainer.datamodule.names)  # type: ignore[attr-defined]
        with replacing(self.path) as file:
            file.write_bytes(picture(figure, "png"))
        log_image(trainer, "experts/heat_maps", figure)


def draw(frequencies: Tensor, names: list[str]) -> Any:
    """Draw layer by expert, and domain by expert for each layer.

    Args:
        frequencies: fp32 ``[L, D, E]``, fractions of the choices of a domain in a layer, which sum to 1 over experts.
        names: Names of the ``D`` domains.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    layers, _, experts = frequencies.shape
    loads = (experts * frequencies).numpy()
    figure = Figure(figsize=(4 * (layers + 1), 3.6), layout="constrained")
    panels = figure.subplots(1, layers + 1)
    style = {"cmap": "viridis", "vmin": 0, "vmax": max(2.0, float(loads.max())), "aspect": "auto"}
    for i, panel in enumerate(panels):
        image = panel.imshow(loads.mean(1) if i == 0 else loads[i - 1], **style)
        panel.set_title("all domains alike" if i == 0 else f"layer {i - 1}", loc="left")
        panel.set(xlabel="expert", yticks=range(layers if i == 0 else len(names)))
        panel.locator_params(axis="x", integer=True)
        panel.set_yticklabels([f"layer {layer}" for layer in range(layers)] if i == 0 else names if i == 1 else [])
    figure.colorbar(image, ax=panels, label="chosen, times the average expert", fraction=0.02, pad=0.01)
    return figure
