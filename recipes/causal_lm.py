"""Causal language models of transformers: their own logits at some positions, and the mode that they are run in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curation.log_probs import token_log_probs
from curation.scoring import side_effect_free


@dataclass(frozen=True)
class OwnLogits:
    """The logits of a causal language model at some positions, with its soft caps, scales and adapters.

    Attributes:
        model: A causal language model of transformers, or a ``PeftModel`` around one.
        head: The module that makes logits from hidden states, ``model.get_output_embeddings()``.
        linear: Whether the model's logits are those of ``head`` unchanged, and ``head`` is a linear layer without
            adapters or hooks. Log-probabilities then need the logits of a few positions in memory at a time.
    """

    model: Any
    head: Any
    linear: bool

    def at(self, positions: Tensor, **inputs: Tensor) -> Tensor:
        """The model's logits ``[N, V]``; no other positions go through its head.

        Args:
            positions: int64 ``[N]``, positions of the batch, counted row by row.
            **inputs: Inputs of the model, such as ``input_ids`` and ``attention_mask``, int64 ``[B, T]``.
        """
        return self._run(inputs, lambda hidden: hidden.flatten(0, 1).index_select(0, positions)[None])[0]

    def log_probs(self, positions: Tensor, targets: Tensor, temperature: float, **inputs: Tensor) -> Tensor:
        """The log-probability of a token after each position, fp32 ``[N]``.

        Args:
            positions: int64 ``[N]``, positions of the batch, counted row by row.
            targets: int64 ``[N]``, the tokens.
            temperature: Divisor of the logits.
            **inputs: Inputs of the model, such as ``input_ids`` and ``attention_mask``, int64 ``[B, T]``.
        """
        if not self.linear:
            logits = self.at(positions, **inputs)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
            return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
        states: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            states.append(hidden)
            return hidden[:, :0]  # no logits are made

        self._run(inputs, keep)
        rows = states[0].flatten(0, 1).index_select(0, positions)
        return token_log_probs(rows, self.head.weight, targets, self.head.bias, temperature)

    def _run(self, inputs: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
        """The model's logits where its head is given changed hidden states ``[B, T, d]``."""
        hook = self.head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
        try:
            return self.model(**inputs, use_cache=False).logits
        finally:
            hook.remove()


def own_logits(model: Any) -> OwnLogits:
    """Find out, by runs on six tokens each, how to compute the logits of a model at some positions.

    Args:
        model: A causal language model of transformers, or a ``PeftModel`` around one; it is not changed.

    Raises:
        TypeError: If the model cannot be run on tokens alone, looks ahead, has virtual tokens of peft or no output
            head, or its logits at some positions are not those that it has where all go through its head.
    """
    name = type(model).__name__
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise TypeError(f"{name} has virtual tokens, which are not supported; use another kind of adapter, as LoRA.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise TypeError(f"{name} has no output head (`get_output_embeddings`): it is no causal language model.")
    ids = torch.arange(2, 8, device=model.device).view(2, 3) % model.get_input_embeddings().weight.size(0)
    later = ids.clone()
    later[:, -1] = ids[:, 0]
    logits = OwnLogits(model, head, False)
    positions = torch.tensor([1, 3, 4], device=ids.device)
    try:
        with side_effect_free(model):
            whole, changed = (model(input_ids=tokens, use_cache=False).logits for tokens in (ids, later))
            some = logits.at(positions, input_ids=ids)
            linear = _is_plain(head) and _changes_nothing(logits, ids)
    except Exception as error:  # models raise anything
        raise TypeError(
            f"{name} cannot be run as a causal language model on tokens alone: {type(error).__name__}: {error}"
        ) from error
    if whole.shape[:2] != ids.shape or not _close(whole.flatten(0, 1)[positions], some):
        raise TypeError(f"{name} makes its logits in another way than position by position by its output head.")
    if not _close(whole[:, :-1], changed[:, :-1]):
        raise TypeError(f"{name} looks ahead: it is no causal language model; see `is_decoder` of its config.")
    return OwnLogits(model, head, linear)


def _is_plain(head: Any) -> bool:
    hooks = head._forward_hooks or head._forward_pre_hooks
    return type(head) is nn.Linear and not hooks and "forward" not in vars(head)


def _changes_nothing(logits: OwnLogits, ids: Tensor) -> bool:
    """Whether logits of all sizes stay as the head makes them: caps and scales show in large ones only."""
    made: list[Tensor] = []

    def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        values = torch.linspace(-300, 300, output.numel(), device=output.device)
        made.append(values.view(output.shape).to(output.dtype))
        return made[-1]

    hook = logits.head.register_forward_hook(replace)
    try:
        output = logits.at(torch.zeros(1, dtype=torch.int64, device=ids.device), input_ids=ids)
    finally:
        hook.remove()
    return len(made) == 1 and made[0][0].shape == output.shape and bool(made[0][0].eq(output.to(made[0].dtype)).all())


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding in the dtype of the model."""
    tolerance = 64 * torch.finfo(a.dtype).eps
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max() + 1))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model as it samples, without dropout, also where it learns.

    Modules with gradient checkpointing stay in the mode that they are in: transformers checkpoints in training only.
    """
    training = [m for m in model.modules() if m.training and not getattr(m, "gradient_checkpointing", False)]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def keep_layers(model: Any, num_layers: int | None) -> None:
    """Cut a decoder to its first layers, in place.

    Args:
        model: A causal language model of transformers, with ``model.base_model.layers``.
        num_layers: Number of layers to keep, from the first; None keeps all.

    Raises:
        ValueError: If the model has fewer layers, or keeps them elsewhere.
    """
    if num_layers is None:
        return
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ValueError(f"Argument `num_layers` must be None for {type(model).__name__}, but got {num_layers!r}.")
    if num_layers > len(layers):
        raise ValueError(f"Argument `num_layers` must be in [1, {len(layers)}], but got {num_layers!r}.")
    model.base_model.layers = layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]
