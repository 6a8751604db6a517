"""A picture of the batch size of a fit, and of the noise of its gradients."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from curation.callbacks import AdaptiveBatchSize, BatchSizeScheduler
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loggers import log_image
from curation.checks import check_path
from curation.recipes.pictures import save_picture


class BatchSizePicture(FitCallback):
    """Draws the rows of a step, and the gradient noise scale, by the samples seen, at the end of a fit.

    They are those of a :class:`~curation.callbacks.BatchSizeScheduler` or
    :class:`~curation.callbacks.AdaptiveBatchSize` of the trainer. In W&B the picture is ``curation/batch_sizes``.

    Args:
        path: The file to write, PNG or SVG.

    Raises:
        ValueError: If ``path`` is no path.

    Example:
        >>> BatchSizePicture("runs/batch_sizes.png").path
        'runs/batch_sizes.png'
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path: str = check_path("path", path)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on rank 0."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        size = next((c for c in callbacks if isinstance(c, (BatchSizeScheduler, AdaptiveBatchSize))), None)
        if size is None or not trainer.is_global_zero:
            return
        noise_scales = size.noise_scales if isinstance(size, AdaptiveBatchSize) else []
        figure = draw(size.sizes, size.seen, noise_scales)
        save_picture(figure, self.path)
        log_image(trainer, "curation/batch_sizes", figure)


def draw(sizes: Sequence[tuple[int, int]], seen: int, noise_scales: Sequence[tuple[int, float]] = ()) -> Any:
    """A staircase of the rows of a step, and a point for each noise scale that is finite.

    Args:
        sizes: Samples seen, and the rows of a step from then on.
        seen: Samples of the whole fit.
        noise_scales: Samples seen, and the noise scale in rows.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    at, rows = [*(samples for samples, _ in sizes), seen], [rows for _, rows in sizes]
    axes.step(at, [*rows, rows[-1]], where="post", label="rows of a step")
    finite = [(samples, scale) for samples, scale in noise_scales if 0 < scale < float("inf")]
    if finite:
        axes.plot(*zip(*finite, strict=True), ".", label="gradient noise scale")
    axes.set(xlabel="samples seen", ylabel="rows")
    axes.set_yscale("log", base=2)  # sizes are often doubled
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.legend(frameon=False)
    return figure
