"""Low-rank adapters of a causal language model (LoRA, arXiv 2106.09685): trained in the place of its weights."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NotRequired, TypedDict

import torch

from curation.checks import check_integer, check_number
from curation.recipes.seeds import global_seed


class Lora(TypedDict):
    """Settings of the adapters: the output ``W x`` of a linear layer becomes ``W x + (alpha / rank) B A x``.

    Attributes:
        rank: Number of rows of ``A`` and of columns of ``B``.
        targets: Names of the layers, or the ends of their paths, as ``["q_proj", "v_proj"]``.
        alpha: Scale of the adapters; twice the rank where it is left out.
    """

    rank: int
    targets: list[str]
    alpha: NotRequired[float]


def check_lora(lora: Any) -> Lora | None:
    """Refuse what are no settings of adapters.

    Args:
        lora: The settings, or None.

    Raises:
        ValueError: If a setting is missing, unknown, of the wrong type or out of its range.

    Example:
        >>> check_lora({"rank": 0, "targets": ["q_proj"]})
        Traceback (most recent call last):
        ValueError: Argument `lora.rank` must be an integer >= 1, but got 0.
    """
    if lora is None:
        return None
    if not isinstance(lora, Mapping) or not {"rank", "targets"} <= lora.keys() <= {"rank", "targets", "alpha"}:
        raise ValueError(
            f"Argument `lora` must be None or have `rank`, `targets` and optionally `alpha`, but got {lora!r}."
        )
    check_integer("lora.rank", lora["rank"], 1)
    check_number("lora.alpha", lora.get("alpha", 1), "(0, inf)")
    targets = lora["targets"]
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"Argument `lora.targets` must be a list of names, at least one, but got {targets!r}.")
    return lora  # type: ignore[return-value]


def add_adapters(model: Any, lora: Lora | None) -> Any:
    """A model with adapters that change nothing yet; all other weights are frozen.

    Args:
        model: A causal language model of transformers; its layers are wrapped in place.
        lora: Settings of the adapters; None returns the model as it is.

    Returns:
        A ``peft.PeftModel``. The draw of ``A`` depends on the seed of ``seed_everything`` alone.

    Raises:
        ImportError: If peft is missing.
        ValueError: If the model has no layer of a name in ``targets``, or one that takes no adapter.
    """
    if lora is None:
        return model
    if find_spec("peft") is None:
        raise ImportError("Adapters (`lora`) need peft. Run `pip install 'lightning-curation[lora]'`.")
    from peft import LoraConfig, get_peft_model

    paths = [f".{path}" for path, _ in model.named_modules()]
    for target in lora["targets"]:  # peft takes what it finds, and is silent on the others
        if not any(path.endswith(f".{target}") for path in paths):
            raise ValueError(
                f"Argument `lora.targets` must name layers of {type(model).__name__}, but it has no {target!r}."
            )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["rank"],
        lora_alpha=lora.get("alpha", 2 * lora["rank"]),  # type: ignore[arg-type]
        target_modules=list(lora["targets"]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(global_seed(None))
        return get_peft_model(model, config)
