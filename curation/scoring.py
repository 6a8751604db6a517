"""One forward pass that scores a candidate batch and changes nothing.

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
import torch.nn.functional as F
from torch import Tensor, nn

from curation import rng
from curation.replace import replace_attribute

IGNORED = -100
_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass(frozen=True)
class Route:
    """How the outputs of a batch are taken.

    Attributes:
        name: For the log line at the start of the fit.
        take: Maps a batch to outputs and targets, as they come.
    """

    name: str
    take: Callable[[Any], Any]

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, T, V]`` or ``[B, C]`` and aligned int64 targets ``[B, T]`` or ``[B]``; -100 is not scored.

        Raises:
            TypeError: If the module gives something else.
        """
        return _checked(self.take(copy.copy(batch)))  # a step may take things out of its batch


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
    """
    score_step: Any = getattr(module, "score_step", None)
    if callable(score_step):
        return Route("score_step", score_step)
    if isinstance(batch, Mapping) and ("input_ids" in batch or "pixel_values" in batch):
        model = _hugging_face_model(module)
        if model is not None:
            _refuse_packed(batch)
            return Route(f"Hugging Face {type(model).__name__}", lambda b: _run_hugging_face(model, b))
    if _is_classification(batch):

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


def _is_classification(batch: Any) -> bool:
    if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        return False
    y = batch[1]
    return not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool) and y.dim() in (1, 2)


def _hugging_face_models(module: nn.Module) -> list[str]:
    """Names of the outermost submodules with the interface of a Hugging Face model."""
    found: list[str] = []
    for name, child in module.named_modules():
        nested = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if not nested and hasattr(child, "get_output_embeddings") and hasattr(child, "config"):
            found.append(name)
    return found


def _hugging_face_model(module: nn.Module) -> Any:
    found = _hugging_face_models(module)
    if len(found) > 1:
        raise TypeError(
            f"{type(module).__name__} holds several Hugging Face models ({', '.join(found)}); add a method "
            "`score_step(self, batch)` that returns `(logits, targets)` of the one to score with."
        )
    return module.get_submodule(found[0]) if found else None


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


def _checked(scored: Any) -> tuple[Tensor, Tensor]:
    hint = "must be (logits, targets): floating [B, T, V] with integer [B, T], or [B, C] with [B]"
    if not isinstance(scored, tuple):
        raise TypeError(f"The outputs to score {hint}, but got {type(scored).__name__}.")
    if len(scored) != 2 or not all(isinstance(t, Tensor) for t in scored):
        found = ", ".join(type(t).__name__ for t in scored)
        raise TypeError(f"The outputs to score {hint}, but got ({found}).")
    logits, targets = scored
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
        models = _hugging_face_models(module) if isinstance(batch, Mapping) else []
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
    """The module whose output are the logits that the loss is computed from, or None if that is not known."""
    if isinstance(batch, Mapping):
        models = _hugging_face_models(module)
        if len(models) != 1:
            return None
        model: Any = module.get_submodule(models[0])
        return model.get_output_embeddings() or model
    return module if _is_classification(batch) else None


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


def compact(outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the scored positions of each sample to the front and cut to the longest; the rest is zero.

    Padding and prompts then cost nothing and change nothing. Costs one host synchronisation where ``T > 1``.

    Args:
        outputs: ``[B, T, D]``.
        mask: bool ``[B, T]``, true where a position is scored.

    Returns:
        ``[B, n, D]`` and the numbers of scored positions, int64 ``[B]``; ``n`` is their maximum, at least 1.
    """
    order = _scored_first(mask)
    front = outputs.gather(1, order[..., None].expand(-1, -1, outputs.size(-1)))
    return front.masked_fill(~mask.gather(1, order)[..., None], 0), mask.sum(1)


def _scored_first(mask: Tensor) -> Tensor:
    """Positions, the scored ones in front, as many as the most of any sample: int64 ``[B, n]``."""
    n = max(1, int(mask.sum(1).max())) if mask.size(1) > 1 else 1
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :n]


def per_sample_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, averaged over its scored positions.

    Args:
        logits: ``[B, T, V]`` or ``[B, C]``, any floating dtype; computed in fp32, one sample ``[T, V]`` at a time.
        targets: int64 ``[B, T]`` or ``[B]``; -100 is ignored.

    Returns:
        fp32 ``[B]``; NaN for a sample with no scored position.

    Example:
        >>> per_sample_loss(torch.zeros(2, 3, 8), torch.tensor([[-100, 1, 2], [0, 0, 0]]))
        tensor([2.0794, 2.0794])
    """
    if targets.dim() == 1:
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack(
        [F.cross_entropy(x.float(), t, ignore_index=IGNORED) for x, t in zip(logits, targets, strict=True)]
    )


def per_sample_grad_norm(logits: Tensor, targets: Tensor) -> Tensor:
    """Norm of the gradient of each sample's loss with respect to its logits, ``||softmax - onehot|| / n``.

    Up to a constant an upper bound of the norm with respect to all parameters (arXiv 1803.00942, sec. 3.2).

    Args:
        logits: ``[B, T, V]`` or ``[B, C]``, any floating dtype; computed in fp32, one sample ``[T, V]`` at a time.
        targets: int64 ``[B, T]`` or ``[B]``; -100 is ignored.

    Returns:
        fp32 ``[B]``; NaN for a sample with no scored position.

    Example:
        >>> per_sample_grad_norm(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.7071])
    """

    def squares(x: Tensor, t: Tensor) -> Tensor:
        p = x.float().softmax(-1)
        scored = t.ne(IGNORED)
        of_target = p.gather(-1, t.masked_fill(~scored, 0)[..., None])[..., 0]
        return (p.square().sum(-1) - 2 * of_target + 1).clamp(min=0) * scored

    scored = targets.ne(IGNORED)
    if targets.dim() == 1:
        return squares(logits, targets).sqrt().masked_fill(~scored, torch.nan)
    total = torch.stack([squares(x, t).sum() for x, t in zip(logits, targets, strict=True)])
    return total.sqrt() / scored.sum(1).float().masked_fill(~scored.any(1), torch.nan)


def per_sample_from_hidden(
    value: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor, head: nn.Linear
) -> Tensor:
    """A value of ``head(hidden)``, with the logits of one sample's scored positions at a time.

    Costs one host synchronisation.

    Args:
        value: :func:`per_sample_loss` or :func:`per_sample_grad_norm`.
        hidden: ``[B, T, d]`` or ``[B, d]``, the head's input.
        targets: int64 ``[B, T]`` or ``[B]``.
        head: The output layer.

    Returns:
        fp32 ``[B]``; NaN for a sample with no scored position.
    """
    if targets.dim() == 1:
        return value(head(hidden.to(head.weight.dtype)), targets)
    order = _scored_first(targets.ne(IGNORED))
    rows = hidden.gather(1, order[..., None].expand(-1, -1, hidden.size(-1)))
    labels = targets.gather(1, order)
    return torch.cat([value(head(h)[None], t[None]) for h, t in zip(rows.to(head.weight.dtype), labels, strict=True)])
