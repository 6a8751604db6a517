"""Floating-point operations (FLOPs) of the parts of a fit that are to be counted."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class FlopCount:
    """Counts FLOPs with torch's own counter: matrix products, convolutions and attention.

    Args:
        total: FLOPs that were counted before.

    Attributes:
        total: FLOPs counted up to the last :meth:`stop`.

    Example:
        >>> count = FlopCount()
        >>> count.start()
        >>> _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> count.stop()
        >>> count.total
        48
    """

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self._counter: FlopCounterMode | None = None

    def start(self) -> None:
        """Count from here on; does nothing while counting."""
        if self._counter is not None:
            return
        aten = torch.ops.aten
        self._counter = FlopCounterMode(
            display=False,
            custom_mapping={  # torch has these formulas, but does not apply them to its attention on a CPU
                aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            },
        )
        self._counter.__enter__()

    def stop(self) -> None:
        """Add what was counted to the total; does nothing while not counting."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.total += self._counter.get_total_flops()
            self._counter = None


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
