"""Settings, histograms, tables and pictures in loggers; those that take none are left out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from curation import __version__
from curation.callbacks.lightning.loop import logging_step
from curation.files import replacing
from curation.settings import Configured, settings_of


def takes_histograms(trainer: Trainer) -> bool:
    """Whether this process has a logger that :func:`log_histogram` writes to."""
    return trainer.is_global_zero and any(isinstance(x, (WandbLogger, TensorBoardLogger)) for x in trainer.loggers)


def takes_media(trainer: Trainer) -> bool:
    """Whether this process has a logger that :func:`log_table` and :func:`log_image` write to."""
    return trainer.is_global_zero and any(isinstance(x, WandbLogger) for x in trainer.loggers)


def log_histogram(trainer: Trainer, name: str, values: Sequence[float], **wandb_options: Any) -> None:
    """Log a histogram to W&B and TensorBoard, under the step of every other metric of the batch.

    Args:
        trainer: The trainer.
        name: Name of the metric.
        values: Finite numbers.
        wandb_options: Options of ``wandb.Histogram``.
    """
    if not trainer.is_global_zero or not len(values):
        return
    step = logging_step(trainer)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.log_metrics({name: wandb.Histogram(values, **wandb_options)}, step=step)  # type: ignore[dict-item]
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, torch.as_tensor(values), step)


@contextmanager
def not_essential(what: str) -> Iterator[None]:
    """Turn any error into a warning: no fit fails, or hides its own error, for the sake of a table or a picture.

    Args:
        what: What is written, for the warning.
    """
    try:
        yield
    except Exception as error:  # a logger may raise anything
        rank_zero_warn(f"{what} was not written: {type(error).__name__}: {error}")


def log_settings(trainer: Trainer, parts: Sequence[Any]) -> None:
    """Log the arguments of callbacks, a data module or samplers as hyperparameters, nested by class name.

    Those of this package, of what is derived from it and of Lightning's callbacks: the arguments of others may be
    secrets.
    """
    settings: dict[str, Any] = {}
    names: Counter[str] = Counter()
    for part in parts:
        known = type(part).__module__.startswith(("curation.", "lightning.pytorch.callbacks."))
        if isinstance(part, (ProgressBar, ModelSummary)) or not (known or isinstance(part, Configured)):
            continue
        name = type(part).__name__
        names[name] += 1
        settings[name if names[name] == 1 else f"{name}_{names[name]}"] = settings_of(part)
    settings = {name: values for name, values in settings.items() if values}
    for logger in trainer.loggers if settings and trainer.is_global_zero else []:
        with not_essential("The settings of the fit"):
            logger.log_hyperparams({"lightning_curation": __version__, **settings})


def log_table(trainer: Trainer, name: str, columns: list[str], rows: Sequence[list[Any]]) -> None:
    """Log a table to W&B, if it has rows; a warning where that fails."""
    for logger in trainer.loggers if rows and trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            with not_essential(f"The table {name!r}"):
                logger.log_table(name, columns=columns, data=list(rows))


def log_image(trainer: Trainer, name: str, image: Any) -> None:
    """Log a picture to W&B: a file, a matplotlib figure, or whatever ``wandb.Image`` takes.

    Where that fails there is a warning.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            with not_essential(f"The picture {name!r}"):
                logger.log_image(name, [str(image) if isinstance(image, Path) else image])


def picture_folder(trainer: Trainer) -> str | None:
    """The folder for pictures of a fit, on all processes at once; None where the fit logs nothing.

    The logger tells its folder by a broadcast, so a picture that rank 0 draws alone has to know it before.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    return None if trainer.fast_dev_run or not trainer.loggers else str(folder).rstrip("/")  # type: ignore[attr-defined]


def save_figure(figure: Any, path: str) -> None:
    """Write a matplotlib figure as PNG.

    Args:
        figure: The figure.
        path: The file: a path, or a URL of any file system that Lightning writes its logs to.

    Raises:
        OSError: If the file cannot be written; the error names it.
    """
    if "://" not in path:
        with replacing(path) as file:
            figure.savefig(file, dpi=120)
        return
    files, _ = url_to_fs(path)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    with files.open(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
