"""Routes to the outputs of every sample of a batch, without side effects.

A module's own ``training_step`` returns one number for the whole batch, so the outputs of every sample are taken by
one of three routes:

1. ``module.score_step(batch) -> (logits, targets)``, where the module defines it;
2. a Hugging Face model inside the module, for mappings with ``input_ids`` or ``pixel_values``;
3. ``module(x)`` for classification batches ``(x, y)`` with integer ``y``.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curation import rng
from curation.scoring.losses import IGNORED

_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass(frozen=True)
class Route:
    """How the outputs of a batch are taken.

    Attributes:
        name: Name in the log line at the start of the fit.
        take: Function from a batch to outputs and targets, not yet checked.
    """

    name: str
    take: Callable[[Any], Any]

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, T, V]`` or ``[B, C]`` and aligned int64 targets ``[B, T]`` or ``[B]``; -100 is not scored.

        Raises:
            TypeError: If the module returns something else.
        """
        return _check_outputs(self.take(copy.copy(batch)))  # a step may take things out of its batch


@contextmanager
def side_effect_free(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for every submodule, no gradients, and every random stream left as it was.

    Buffers of normalisation layers stay as they are, because evaluation mode does not update them. The mode of each
    submodule is restored one by one, since parts of a module may be frozen in evaluation mode.
    """
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        with torch.no_grad(), rng.isolated():
            yield
    finally:
        for m in training:
            m.training = True


def find_route(module: nn.Module, batch: Any) -> Route:
    """Choose the route for a module and the batches it is trained on.

    Args:
        module: The module that is trained.
        batch: One candidate batch, without sample ids.

    Raises:
        TypeError: If no route fits; the message names the method to add.
        ValueError: If the batch packs several sequences into a row, where rows are not samples.

    Example:
        >>> batch = [torch.zeros(2, 3), torch.tensor([0, 1])]
        >>> route = find_route(nn.Linear(3, 4), batch)
        >>> logits, targets = route(batch)
        >>> route.name, logits.shape
        ('forward(x)', torch.Size([2, 4]))
    """
    score_step: Any = getattr(module, "score_step", None)
    if callable(score_step):
        return Route("score_step", score_step)
    if isinstance(batch, Mapping) and ("input_ids" in batch or "pixel_values" in batch):
        model = _hugging_face_model(module)
        if model is not None:
            _refuse_packed(batch)
            return Route(f"Hugging Face {type(model).__name__}", lambda b: _run_hugging_face(model, b))
    if is_classification(batch):

        def take(b: Any) -> tuple[Any, Tensor]:
            try:
                return _logits(module(b[0])), b[1]
            except NotImplementedError as error:
                raise _no_route(module, b) from error

        return Route("forward(x)", take)
    raise _no_route(module, batch)


def _no_route(module: nn.Module, batch: Any) -> TypeError:
    return TypeError(
        f"No per-sample outputs can be taken from {type(module).__name__} for a batch of type "
        f"{type(batch).__name__}. Add a method `score_step(self, batch)` that returns `(logits, targets)`: logits "
        "[B, T, V] with targets [B, T], or logits [B, C] with targets [B]; target -100 marks positions to ignore."
    )


def is_classification(batch: Any) -> bool:
    """Whether a batch is a pair ``(x, y)`` with integer classes ``y`` ``[B]`` or ``[B, T]``."""
    if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        return False
    y = batch[1]
    return not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool) and y.dim() in (1, 2)


def hugging_face_models(module: nn.Module) -> list[str]:
    """Names of the outermost submodules with the interface of a Hugging Face model."""
    names: list[str] = []
    for name, child in module.named_modules():
        nested = any(name.startswith(f"{outer}.") or outer == "" for outer in names)
        if not nested and hasattr(child, "get_output_embeddings") and hasattr(child, "config"):
            names.append(name)
    return names


def _hugging_face_model(module: nn.Module) -> Any:
    names = hugging_face_models(module)
    if len(names) > 1:
        raise TypeError(
            f"{type(module).__name__} holds several Hugging Face models ({', '.join(names)}); add a method "
            "`score_step(self, batch)` that returns `(logits, targets)` of the one to score with."
        )
    return module.get_submodule(names[0]) if names else None


def _refuse_packed(batch: Mapping) -> None:
    packed = next((key for key in _PACKED_KEYS if key in batch), None)
    positions = batch.get("position_ids")
    if packed is None and isinstance(positions, Tensor) and positions.dim() == 2:
        steps = positions[:, 1:] - positions[:, :-1]
        restarts = steps.lt(0)
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == positions.shape:
            restarts = restarts & mask[:, 1:].ne(0) & mask[:, :-1].ne(0)
        packed = "position_ids" if bool(restarts.any()) else None
    if packed is not None:
        raise ValueError(
            f"The batch packs several sequences into one row (`{packed}`); a row must be one sample to be selected."
        )


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _run_hugging_face(model: Any, batch: Mapping) -> tuple[Any, Any]:
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "label") and (takes_all or k in parameters)}
    labels = batch.get("labels", batch.get("label"))
    config = model.config
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    generates = bool(getattr(model, "can_generate", bool)())
    if generates:
        inputs["use_cache"] = False
    if encoder_decoder and "decoder_input_ids" not in inputs and labels is not None:
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise TypeError(
                f"{type(model).__name__} does not tell how its decoder's input follows from `labels`; put "
                "`decoder_input_ids` into the batch, or add a method `score_step`."
            )
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    if labels is None:
        if not generates or encoder_decoder:
            raise TypeError("The batch has no `labels`, so its targets are unknown; add `labels` or a `score_step`.")
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"].eq(0), IGNORED)
    logits = _logits(model(**inputs))
    if generates and not encoder_decoder:  # position t predicts token t + 1
        return logits[:, :-1], labels[:, 1:]
    return logits, labels


def _check_outputs(outputs: Any) -> tuple[Tensor, Tensor]:
    hint = "must be (logits, targets): floating [B, T, V] with integer [B, T], or [B, C] with [B]"
    if not isinstance(outputs, tuple):
        raise TypeError(f"The outputs to score {hint}, but got {type(outputs).__name__}.")
    if len(outputs) != 2 or not all(isinstance(t, Tensor) for t in outputs):
        types = ", ".join(type(t).__name__ for t in outputs)
        raise TypeError(f"The outputs to score {hint}, but got ({types}).")
    logits, targets = outputs
    integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if (
        not logits.is_floating_point()
        or not integer
        or logits.dim() not in (2, 3)
        or logits.shape[:-1] != targets.shape
    ):
        raise TypeError(
            f"The outputs to score {hint}, but got {logits.dtype} {list(logits.shape)} with {targets.dtype} "
            f"{list(targets.shape)}. A method `score_step` of the module can give them."
        )
    return logits, targets.long()
