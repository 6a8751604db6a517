"""Routes to the outputs of every sample of a batch, without side effects.

A module's own ``training_step`` returns one number for the whole batch, so the outputs of every sample are taken by
one of four routes:

1. ``module.score_step(batch)``, where the module defines it: ``(logits, targets)``, or losses of any task, ``[B]``;
2. a Hugging Face model inside the module, for mappings with ``input_ids`` or ``pixel_values``;
3. ``module(x)`` for classification batches ``(x, y)`` with integer ``y``;
4. ``module.training_step``, where its loss is a mean of losses of the rows.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from curation import rng
from curation.batch import copied
from curation.scoring.losses import IGNORED
from curation.scoring.step_losses import StepLosses, can_run_step, no_losses

_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass(frozen=True)
class Route:
    """How the outputs of a batch are taken.

    Attributes:
        name: Name in the log line at the start of the fit.
        take: Function from a batch to outputs and targets, not yet checked.
        source: Submodule whose output holds the logits; None with ``score_step``.
        align: Function from an output of ``source`` and its batch to what ``take`` gives; None with ``score_step``.
    """

    name: str
    take: Callable[[Any], Any]
    source: nn.Module | None = None
    align: Callable[[Any, Any], Any] | None = None

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Outputs ``[B, T, V]`` or ``[B, C]`` and aligned int64 targets ``[B, T]`` or ``[B]``; -100 is not scored.

        Or losses ``[B]`` and None.

        Raises:
            TypeError: If the module returns something else.
        """
        outputs = self.take(copied(batch))  # a step may take things out of its batch or change them
        if isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.dim() == 1:
            return outputs, None
        return check_outputs(outputs)


@contextmanager
def side_effect_free(module: nn.Module, random_streams: bool = True) -> Iterator[None]:
    """Evaluation mode for every submodule, no gradients, and what a forward pass changes left as it was.

    Buffers of normalisation layers stay as they are, because evaluation mode does not update them. Buffers of modules
    that are not torch's, and the states of metrics, are restored. So is the mode of each submodule, one by one, since
    parts of a module may be frozen in evaluation mode.

    Args:
        module: The module that is run.
        random_streams: Restore the random streams, too.
    """
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        with ExitStack() as stack:
            for m in module.modules():
                if isinstance(m, Metric):
                    stack.callback(_restore_metric(m))
                elif m._buffers and not type(m).__module__.startswith("torch.nn."):
                    stack.callback(_restore_buffers(m))
            stack.enter_context(torch.no_grad())
            if random_streams:
                stack.enter_context(rng.isolated())
            yield
    finally:
        for m in training:
            m.training = True


def _restore_metric(metric: Metric) -> Callable[[], None]:
    """Let a metric work on a copy of its state; the function that is returned puts the state back."""
    before = dict(vars(metric))
    vars(metric).update(copied(dict(metric.metric_state)))

    def restore() -> None:
        vars(metric).clear()
        vars(metric).update(before)

    return restore


def _restore_buffers(module: nn.Module) -> Callable[[], None]:
    """A function that restores the buffers of a module, and the attributes set with them, where they changed."""
    before, buffers = dict(vars(module)), dict(module._buffers)
    values = {name: (b.clone(), b._version) for name, b in buffers.items() if b is not None}

    def restore() -> None:
        changed = [name for name, (_, version) in values.items() if buffers[name]._version != version]  # type: ignore[union-attr]
        replaced = module._buffers.keys() != buffers.keys() or any(
            module._buffers[n] is not buffers[n] for n in buffers
        )
        for name in changed:
            buffers[name].copy_(values[name][0])  # type: ignore[union-attr]
        if changed or replaced:
            vars(module).clear()
            vars(module).update(before)
            module._buffers.clear()
            module._buffers.update(buffers)

    return restore


def find_route(module: nn.Module, batch: Any, score_step: bool = True) -> Route:
    """Choose the route for a module and the batches it is trained on.

    Args:
        module: The module that is trained.
        batch: One candidate batch, without sample ids.
        score_step: Whether the module's own ``score_step``, which is a pass of its own, may be the route.

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
    own: Any = getattr(module, "score_step", None)
    if score_step and callable(own):
        return Route("score_step", own)
    if isinstance(batch, Mapping) and ("input_ids" in batch or "pixel_values" in batch):
        model = _hugging_face_model(module)
        if model is not None:
            _refuse_packed(batch)
            take, align = partial(_run_hugging_face, model), partial(_align_hugging_face, model)
            return Route(f"Hugging Face {type(model).__name__}", take, model, align)
    if is_classification(batch):

        def take_forward(b: Any) -> tuple[Any, Tensor]:
            try:
                return _logits(module(b[0])), b[1]
            except NotImplementedError as error:
                raise no_losses(module, b, "the module has no `forward` either") from error

        return Route("forward(x)", take_forward, module, lambda output, b: (_logits(output), b[1]))
    route = step_route(module) if score_step else None
    if route is None:
        missing = not callable(getattr(module, "training_step", None))
        raise no_losses(module, batch, "there is none" if missing else "it is not automatic")
    return route


def step_route(module: nn.Module) -> Route | None:
    """The losses that ``training_step`` is a mean of, for a module whose step changes nothing; None for another."""
    if callable(getattr(module, "score_step", None)) or not can_run_step(module):
        return None
    return Route("the loss of `training_step`", StepLosses(module))


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


def _predicts_next_token(model: Any) -> bool:
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    return bool(getattr(model, "can_generate", bool)()) and not encoder_decoder


def _run_hugging_face(model: Any, batch: Mapping) -> tuple[Any, Any]:
    labels = _labels(model, batch)
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "label") and (takes_all or k in parameters)}
    if getattr(model, "can_generate", bool)():
        inputs["use_cache"] = False
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise TypeError(
                f"{type(model).__name__} does not tell how its decoder's input follows from `labels`; put "
                "`decoder_input_ids` into the batch, or add a method `score_step`."
            )
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return _align_hugging_face(model, model(**inputs), {**batch, "labels": labels})


def _labels(model: Any, batch: Mapping) -> Any:
    """Labels of a batch before they are shifted: those it has, or its tokens."""
    labels = batch.get("labels", batch.get("label"))
    next_token = _predicts_next_token(model)
    if labels is None:
        if not next_token:
            raise TypeError("The batch has no `labels`, so its targets are unknown; add `labels` or a `score_step`.")
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"].eq(0), IGNORED)
    if next_token and (not isinstance(labels, Tensor) or labels.dim() != 2):
        shape = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"{type(model).__name__} predicts tokens, so `labels` must be [B, T], but got {shape}. If another head "
            "is trained, add a method `score_step(self, batch)` that returns its `(logits, targets)`."
        )
    return labels


def _align_hugging_face(model: Any, output: Any, batch: Mapping) -> tuple[Any, Any]:
    logits, labels = _logits(output), _labels(model, batch)
    if _predicts_next_token(model):  # position t predicts token t + 1
        return logits[:, :-1], labels[:, 1:]
    return logits, labels


def check_outputs(outputs: Any) -> tuple[Tensor, Tensor]:
    """Outputs and int64 targets, if they are of the shapes that a route promises.

    Raises:
        TypeError: If they are not.
    """
    hint = (
        "must be (logits, targets): floating [B, T, V] with integer [B, T], or [B, C] with [B]; or, of any other "
        "task, the losses of the rows, floating [B]"
    )
    if not isinstance(outputs, tuple):
        got = f"{outputs.dtype} {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"The outputs to score {hint}; but got {got}.")
    if len(outputs) != 2 or not all(isinstance(t, Tensor) for t in outputs):
        types = ", ".join(type(t).__name__ for t in outputs)
        raise TypeError(f"The outputs to score {hint}; but got ({types}).")
    logits, targets = outputs
    integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if (
        not logits.is_floating_point()
        or not integer
        or logits.dim() not in (2, 3)
        or logits.shape[:-1] != targets.shape
    ):
        raise TypeError(
            f"The outputs to score {hint}; but got {logits.dtype} {list(logits.shape)} with {targets.dtype} "
            f"{list(targets.shape)}. A method `score_step` of the module can give either."
        )
    if logits.size(-1) == 1:
        raise TypeError(
            f"The outputs to score {hint}; but got a single logit, {list(logits.shape)}, of which a softmax is 1. "
            "Add a method `score_step` that returns the logits of both classes, `torch.cat([0 * z, z], -1)`."
        )
    return logits, targets.long()
