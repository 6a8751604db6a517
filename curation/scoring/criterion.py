"""The loss that a module computes, as far as its criterion tells."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from curation.scoring.losses import IGNORED


@dataclass(frozen=True)
class Criterion:
    """Settings of a module's cross-entropy.

    Attributes:
        name: Path of the submodule that has the settings; None for the defaults.
        weight: Floating ``[C]``, weights of the classes; None for equal ones.
        ignore_index: Target that is not scored, besides -100.
        label_smoothing: Share of the target that is spread over all classes.
    """

    name: str | None = None
    weight: Tensor | None = None
    ignore_index: int = IGNORED
    label_smoothing: float = 0.0

    def mask(self, targets: Tensor) -> Tensor:
        """Targets int64 ``[B]`` or ``[B, T]`` with -100 in the place of ``ignore_index``."""
        if self.ignore_index == IGNORED:
            return targets
        return targets.masked_fill(targets.eq(self.ignore_index), IGNORED)

    def bind(self, value: Callable[..., Tensor]) -> Callable[[Tensor, Any], Tensor]:
        """``per_sample_loss`` or ``per_sample_grad_norm`` with these settings."""
        if self.weight is None and not self.label_smoothing:
            return value
        return partial(value, weight=self.weight, label_smoothing=self.label_smoothing)

    def describe(self) -> str:
        """The settings that are no defaults, for the log line at the start of the fit; empty where there are none."""
        settings = ["class weights"] if self.weight is not None else []
        settings += [f"ignore_index={self.ignore_index}"] if self.ignore_index != IGNORED else []
        settings += [f"label_smoothing={self.label_smoothing}"] if self.label_smoothing else []
        return f", {', '.join(settings)} of `{self.name}`" if settings else ""


def find_criterion(module: nn.Module) -> Criterion:
    """The settings of the only ``CrossEntropyLoss`` or ``NLLLoss`` among the submodules; the defaults without one.

    Example:
        >>> net = nn.ModuleDict({"loss": nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.1)})
        >>> find_criterion(net).describe()
        ', ignore_index=0, label_smoothing=0.1 of `loss`'
    """
    losses = [(n, m) for n, m in module.named_modules() if isinstance(m, (nn.CrossEntropyLoss, nn.NLLLoss))]
    if len(losses) != 1:
        return Criterion()
    name, loss = losses[0]
    return Criterion(name, loss.weight, loss.ignore_index, getattr(loss, "label_smoothing", 0.0))
