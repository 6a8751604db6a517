"""Floating-point operations (FLOPs) of the parts of a fit that are to be counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class FlopCount:
    """Counts FLOPs with torch's own counter: matrix products, grouped ones too, convolutions and attention.

    Attributes:
        total: FLOPs counted so far.

    Example:
        >>> count = FlopCount()
        >>> count.start()
        >>> _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> count.stop()
        >>> count.total
        48
    """

    def __init__(self) -> None:
        self._total = 0
        self._counter: FlopCounterMode | None = None

    @property
    def total(self) -> int:  # noqa: D102 - see Attributes
        return self._total + (0 if self._counter is None else self._counter.get_total_flops())

    def start(self) -> None:
        """Count from here on; does nothing while counting."""
        if self._counter is not None:
            return
        self._counter = FlopCounterMode(display=False, custom_mapping=_missing_formulas())
        self._counter.__enter__()

    def stop(self) -> None:
        """Add what was counted to the total; does nothing while not counting."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._total, self._counter = self.total, None


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas that torch 2.13 lacks, or does not apply to its attention on a CPU."""
    formulas: dict[Any, Callable[..., int]] = {
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"): _attention,
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"): _attention_backward,
        (torch.ops.aten, "_grouped_mm"): grouped_product_flops,
        (torch.ops.aten, "_scaled_grouped_mm"): grouped_product_flops,
        (torch.ops.transformers, "grouped_mm_fallback"): grouped_product_flops,
        (torch.ops.transformers, "grouped_mm_fallback_backward"): _grouped_product_backward,
    }
    return {getattr(place, name): formula for (place, name), formula in formulas.items() if hasattr(place, name)}


def grouped_product_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """FLOPs of a grouped matrix product.

    Args:
        left: Shape ``[M, K]`` or ``[G, M, K]``. Where not both sides have groups these are parts of M, N or K.
        right: Shape ``[K, N]`` or ``[G, K, N]``.

    Returns:
        ``2 M K N``, times ``G`` where both have groups.

    Example:
        >>> grouped_product_flops((8, 2), (4, 2, 3))  # 8 rows, each multiplied with the matrix of its group
        96
    """
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


def _grouped_product_backward(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * grouped_product_flops(left, right)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
