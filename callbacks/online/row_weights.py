"""Weights of kept rows for modules whose loss takes none."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn


class RowWeights:
    """Weighs each row's share of the gradient, in any module whose loss is a mean over rows or scored positions.

    A module with an attribute ``sample_weights`` gets them there (fp32 ``[k]``, mean about 1) and multiplies its
    per-sample losses by them. In any other module the gradient with respect to the logits is multiplied row by row,
    which has the same effect on every parameter: their gradients are linear in it. The loss that is logged is then
    unweighted.

    Args:
        module: The module that is trained.
        maker: The submodule whose output is the logits, or None if it is not known.

    Attributes:
        weights: fp32 ``[k]``, weights of the rows that are trained on next; None for equal ones.

    Raises:
        ValueError: If ``sample_weights`` of the module is in use.
    """

    def __init__(self, module: LightningModule, maker: nn.Module | None) -> None:
        self.weights: Tensor | None = None
        self._module = module
        self._takes = hasattr(module, "sample_weights")
        if self._takes and module.sample_weights is not None:
            raise ValueError(
                f"`{type(module).__name__}.sample_weights` must be None before training: the weights of the kept "
                "rows are written there."
            )
        self._reached = True
        self._undo: Callable[[], None] = lambda: None
        if self._takes:
            self._undo = lambda: self.set(None)
        elif maker is not None:
            self._undo = maker.register_forward_hook(self._weigh).remove

    def set(self, weights: Tensor | None) -> None:
        """Set the weights fp32 ``[k]`` of the batch that is trained on next; None for equal ones."""
        self.weights = weights
        if self._takes:
            self._module.sample_weights = weights  # type: ignore[assignment]
        else:
            self._reached = weights is None

    def _weigh(self, maker: nn.Module, inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        weights = self.weights
        if weights is None or not isinstance(logits, Tensor) or not logits.requires_grad:
            return
        if logits.dim() < 2 or len(logits) != len(weights):
            self._refuse(f" (logits {list(logits.shape)} for {len(weights)} rows)")
        factors = weights.view(-1, *[1] * (logits.dim() - 1))

        def weigh(gradient: Tensor) -> Tensor:
            self._reached = True
            return gradient * factors.to(gradient.dtype)

        logits.register_hook(weigh)

    def check(self) -> None:
        """Raise a TypeError, after a backward pass, if the weights have not reached it."""
        if not self._reached:
            self._refuse()

    def _refuse(self, detail: str = "") -> None:
        raise TypeError(
            f"The weights of the kept rows did not reach the loss of {type(self._module).__name__}{detail}. Add an "
            "attribute `sample_weights` (None) to it, and multiply the per-sample losses by it where it is set."
        )

    def remove(self) -> None:
        """Restore the module."""
        self._undo()
