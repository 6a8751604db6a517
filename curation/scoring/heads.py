"""Output heads: the layer that makes the logits, and a forward pass that stops before it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from curation.replace import replace_attribute
from curation.scoring.routes import hugging_face_models, is_classification


def find_output_head(module: nn.Module, head: str, batch: Any) -> nn.Linear | None:
    """The linear layer that makes the logits, if the scores may be taken from its input.

    Args:
        module: The module that is trained.
        head: ``"auto"`` asks the Hugging Face model inside; ``"none"`` gives None; anything else is a module path.
        batch: One candidate batch, for ``"auto"``.

    Raises:
        ValueError: If the path names no submodule, or one that is not ``torch.nn.Linear``.
    """
    if head == "none":
        return None
    if head == "auto":
        models = hugging_face_models(module) if isinstance(batch, Mapping) else []
        model = module.get_submodule(models[0]) if len(models) == 1 else None
        layer: Any = model.get_output_embeddings() if model is not None else None  # type: ignore[operator]
        # A head with no more outputs than inputs has logits as small as its input: nothing to gain. The weight of a
        # sharded head is a DTensor, which is not to be multiplied with what is not sharded.
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
            return None
        return layer if layer.out_features > layer.in_features else None
    try:
        layer = module.get_submodule(head)
    except AttributeError as error:
        raise ValueError(
            f"Argument `head` must be 'auto', 'none' or the path of a torch.nn.Linear in {type(module).__name__}, "
            f"but got {head!r}."
        ) from error
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"Argument `head` must name a torch.nn.Linear, but {head!r} is a {type(layer).__name__}.")
    return layer


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def find_logits_maker(module: nn.Module, batch: Any) -> nn.Module | None:
    """The module whose output are the logits that the loss is computed from, or None if that is not known.

    With a ``score_step`` it is the module itself: the logits are made in its ``forward``, if it has one.
    """
    models = hugging_face_models(module) if isinstance(batch, Mapping) else []
    if len(models) == 1:
        model: Any = module.get_submodule(models[0])
        return model.get_output_embeddings() or model
    return module if is_classification(batch) or hasattr(module, "score_step") else None


@contextmanager
def head_as_identity(head: nn.Module | None) -> Iterator[None]:
    """Let a head return its input, so that a route yields ``[B, T, d]`` hidden states where logits would stand.

    Whatever the module does to the positions of its logits (shifting, slicing) is done to the hidden states, and
    the logits are never formed.
    """
    if head is None:
        yield
        return
    undo = replace_attribute(head, "forward", _identity)
    try:
        yield
    finally:
        undo()
