"""What is asked of a proxy: how its scores agree with the large model's, and how much smaller it is."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curation.checks import check_number
from curation.scoring import find_route, side_effect_free

_WIDTHS = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "n_embd",
        "n_inner",
        "d_model",
        "d_ff",
        "dim",
        "hidden_dim",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
    ]
)
_HEADS = frozenset(
    [
        "num_attention_heads",
        "num_key_value_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ]
)
_LAYERS = frozenset(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"])


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two scores of the same rows; equal scores share their mean rank.

    Args:
        a: Floating ``[B]``; rows in which either score is not finite are left out.
        b: Floating ``[B]``.

    Returns:
        fp32 scalar in [-1, 1]; 0 where the rows of a score are all equal. Takes ``B^2`` comparisons.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
        tensor(0.5000)
    """
    known = a.isfinite() & b.isfinite()
    centred = []
    for scores in (a[known], b[known]):
        x = scores.float()
        ranks = (x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2
        centred.append(ranks - ranks.mean())
    product = (centred[0] * centred[1]).sum()
    scale = (centred[0].square().sum() * centred[1].square().sum()).sqrt()
    return torch.where(scale > 0, product / scale.clamp(min=1e-300), 0.0).float()


def smaller_config(config: Any, layers: float = 0.5, width: float = 0.25) -> Any:
    """The configuration of a smaller Hugging Face model of the same family and vocabulary, for a proxy.

    Layers and attention heads are rounded down, to at least one, and hidden sizes to a multiple of the heads; the
    size of a head stays. Settings of single layers (``layer_types``) are those of the first ones.

    Args:
        config: A ``PretrainedConfig``; it is copied. Configurations inside it are made smaller, too.
        layers: Share of the layers that stay, in (0, 1].
        width: Share of the width that stays, in (0, 1].

    Raises:
        ValueError: If a share is out of its range, or the configuration has no layers or no width by a known name.

    Example:
        >>> from types import SimpleNamespace as Config
        >>> small = smaller_config(Config(hidden_size=64, num_attention_heads=8, num_hidden_layers=6))
        >>> small.hidden_size, small.num_attention_heads, small.num_hidden_layers
        (16, 2, 3)
    """
    check_number("layers", layers, "(0, 1]")
    check_number("width", width, "(0, 1]")
    small = copy.deepcopy(config)
    inside = [part for name, part in vars(small).items() if name.endswith("_config") and hasattr(part, "__dict__")]
    found = [_shrink(part, layers, width) for part in (small, *inside)]
    missing = [
        name for name, known in zip(("layers", "width"), zip(*found, strict=True), strict=True) if not any(known)
    ]
    if missing:
        kind = type(config).__name__
        raise ValueError(f"Argument `config` must have {' and '.join(missing)} by a known name, but {kind} has not.")
    return small


def _shrink(config: Any, layers: float, width: float) -> tuple[bool, bool]:
    """Make a configuration smaller, in place; whether it has layers, and a width."""
    values = {name: getattr(config, name, None) for name in _WIDTHS | _HEADS | _LAYERS}
    numbers = {name: value for name, value in values.items() if type(value) is int}
    heads = max([number for name, number in numbers.items() if name in _HEADS], default=1)
    kept = max(1, int(heads * width))
    for name, number in numbers.items():
        if name in _LAYERS:
            value = max(1, int(number * layers))
        elif name in _HEADS:  # as many queries for each key
            value = next(n for n in range(max(1, number * kept // heads), 0, -1) if kept % n == 0)
        else:
            value = number * kept // heads if heads > 1 else max(1, int(number * width))
        setattr(config, name, value)
    types, count = getattr(config, "layer_types", None), getattr(config, "num_hidden_layers", None)
    if isinstance(types, list) and isinstance(count, int):
        config.layer_types = types[:count]
    return any(name in _LAYERS for name in numbers), any(name in _WIDTHS for name in numbers)


def share_of_operations(proxy: nn.Module, model: nn.Module, batch: Any) -> float:
    """FLOPs of a forward pass of the proxy over those of the model, as torch counts them (products, convolutions).

    Args:
        proxy: The small module.
        model: The large module.
        batch: A batch that both take, without sample ids.

    Raises:
        TypeError: If no outputs can be taken from one of them; the message names the method to add.
        ValueError: If torch counts no operations in the model.

    Example:
        >>> batch = [torch.zeros(2, 8), torch.tensor([0, 1])]
        >>> share_of_operations(nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), batch)
        0.26666666666666666
    """
    counts = []
    for module in (proxy, model):
        with side_effect_free(module), FlopCounterMode(display=False) as counter:
            find_route(module, batch)(batch)
        counts.append(counter.get_total_flops())
    if not counts[1]:
        raise ValueError(
            f"Argument `model` must have operations that torch counts, but {type(model).__name__} has none."
        )
    return counts[0] / counts[1]
