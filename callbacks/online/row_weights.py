"""Weights of kept rows for modules whose loss takes none."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

MEAN, SUM = 1, 2  # reductions of torch's negative log-likelihood


class RowWeights:
    """Weighs each row's share of the gradient, in any module whose loss is a mean over rows or scored positions.

    A module with an attribute ``sample_weights`` gets them there (fp32 ``[k]``, mean about 1) and multiplies its
    per-sample losses by them. In any other module a gradient is multiplied row by row, which has the same effect on
    every parameter: that with respect to the losses ``[k]`` which ``training_step`` leaves in an attribute
    ``sample_losses``, where the module has one, or else to the logits. The loss that is logged is then unweighted.

    A mean over the scored positions needs other weights than a mean over rows, by the ratio of the mean lengths of
    kept rows and candidates. Which one it is shows in the gradients of two rows of unequal length; until then it is a
    mean over positions where torch's cross-entropy reduces the positions of all rows or ``over_positions`` says so.

    Args:
        module: The module that is trained.
        maker: The submodule whose output is the logits, or None if it is not known.
        over_positions: Whether the loss of sequences is taken for a mean over scored positions where that is not
            known.

    Attributes:
        weights: fp32 ``[k]``, weights of the rows that are trained on next; None for equal ones.
        positions: Whether the loss is a mean over scored positions; None where that is not known.

    Raises:
        ValueError: If ``sample_weights`` of the module is in use.
    """

    def __init__(self, module: LightningModule, maker: nn.Module | None, over_positions: bool = True) -> None:
        self.weights: Tensor | None = None
        self._module = module
        self._over_positions = over_positions
        self._takes = hasattr(module, "sample_weights")
        self._leaves = hasattr(module, "sample_losses") and not self._takes
        if self._takes and module.sample_weights is not None:
            raise ValueError(
                f"`{type(module).__name__}.sample_weights` must be None before training: the weights of the kept "
                "rows are written there."
            )
        self.positions: bool | None = over_positions if self._takes else None
        self._ratio: Tensor | None = None
        self._edges: set[tuple[Any, int]] = set()
        self._joint = False  # whether torch's cross-entropy reduces the positions of all rows
        self._reached = True
        self._undo: Callable[[], None] = lambda: None
        if self._takes:
            self._undo = lambda: self.set(None)
        elif maker is not None and not self._leaves:
            self._undo = maker.register_forward_hook(self._weigh).remove

    def set(self, weights: Tensor | None, ratio: Tensor | None = None) -> None:
        """Set the weights of the batch that is trained on next.

        Args:
            weights: fp32 ``[k]``; None for equal ones. Divided by ``ratio``, in place, if the loss turns out to be a
                mean over rows.
            ratio: fp32 scalar that a mean over positions put into the weights; None where there is none.
        """
        self.weights, self._ratio = weights, ratio
        self._edges, self._joint = set(), False
        if self._leaves:
            self._module.sample_losses = None  # type: ignore[assignment]
        if self._takes:
            self._module.sample_weights = weights  # type: ignore[assignment]
        else:
            self._reached = weights is None

    def _weigh_losses(self) -> None:
        """Weigh the gradient with respect to the losses that the module has left, in place of that of the logits."""
        losses: Any = self._module.sample_losses
        weights = self.weights
        if weights is None or not isinstance(losses, Tensor) or not losses.requires_grad:
            return
        if losses.shape != weights.shape:
            self._refuse(f" (`sample_losses` {list(losses.shape)} for {len(weights)} rows)")
        edge = torch.autograd.graph.get_gradient_edge(losses)
        if (edge.node, edge.output_nr) in self._edges:
            return
        self._edges.add((edge.node, edge.output_nr))

        def weigh(gradient: Tensor) -> Tensor:
            self._reached = True
            return gradient * weights.to(gradient.dtype)

        losses.register_hook(weigh)

    def inspect(self, loss: Tensor) -> None:
        """Raise a TypeError, before a backward pass, if a part of the loss does not come from the logits."""
        if self._leaves:
            self._weigh_losses()
        if not self._edges or loss.grad_fn is None or loss.grad_fn.name().startswith("CompiledFunction"):
            return
        nodes, seen = [loss.grad_fn], {loss.grad_fn}
        while nodes:
            node = nodes.pop()
            if node.name().startswith("torch::autograd::AccumulateGrad"):
                self._refuse(" as a whole: a part of it is not made of the logits")
            if node.name().startswith("NllLoss") and node._saved_reduction in (MEAN, SUM):  # type: ignore[attr-defined]
                if node._saved_weight is not None and node._saved_reduction == MEAN:  # type: ignore[attr-defined]
                    self._refuse(" as they are: with class weights it is no mean over rows")
                self._joint = True
            for edge in node.next_functions:
                if edge[0] is not None and edge not in self._edges and edge[0] not in seen:
                    seen.add(edge[0])
                    nodes.append(edge[0])

    def _weigh(self, maker: nn.Module, inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        weights = self.weights
        if weights is None or not isinstance(logits, Tensor) or not logits.requires_grad:
            return
        if logits.dim() == 0:  # the loss: DDP runs the step as a `forward` of the module
            return
        if logits.dim() < 2 or len(logits) != len(weights):
            self._refuse(f" (logits {list(logits.shape)} for {len(weights)} rows)")
        edge = torch.autograd.graph.get_gradient_edge(logits)
        self._edges.add((edge.node, edge.output_nr))
        values, ratio, shape = logits.detach(), self._ratio, (-1, *[1] * (logits.dim() - 1))

        def weigh(gradient: Tensor) -> Tensor:
            self._reached = True
            if ratio is not None and self._ratio is ratio:
                self._resolve(gradient, values)
            return gradient * weights.view(shape).to(gradient.dtype)

        logits.register_hook(weigh)

    def _resolve(self, gradient: Tensor, logits: Tensor) -> None:
        """Find what the loss is a mean of; take the ratio out of the weights of a mean over rows."""
        assert self.weights is not None
        assert self._ratio is not None
        if self.positions is None and gradient.dim() == 3:
            self.positions = is_mean_over_positions(gradient, logits)
        positions = (self._joint or self._over_positions) if self.positions is None else self.positions
        if not positions:
            self.weights.div_(self._ratio)
        self._ratio = None  # once a step

    def check(self) -> None:
        """Raise a TypeError, after a backward pass, if the weights have not reached it."""
        if not self._reached:
            unseen = self._leaves and not self._module.automatic_optimization
            self._refuse(": call `self.manual_backward(loss)`, not `loss.backward()`" if unseen else "")

    def _refuse(self, detail: str = "") -> None:
        raise TypeError(
            f"The weights of the rows did not reach the loss of {type(self._module).__name__}{detail}. Add an "
            "attribute `sample_weights` (None) to it, and multiply the per-sample losses by it where it is set. Or "
            "add `sample_losses` (None), and set it to the losses of the rows, [B], in every `training_step`."
        )

    def remove(self) -> None:
        """Restore the module."""
        self._edges = set()
        self._undo()


class WeighsRows(Callback):
    """A callback that weighs rows: the fit stops before a gradient is used that its weights did not reach.

    Attributes:
        row_weights: The weights; None before the first batch that has any.
    """

    row_weights: RowWeights | None = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise if a part of the loss cannot be weighed."""
        if self.row_weights is not None:
            self.row_weights.inspect(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise, before the optimizer's step, if the weights do not reach the loss."""
        if self.row_weights is not None:
            self.row_weights.check()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the weights."""
        super().teardown(trainer, pl_module, stage)
        if self.row_weights is not None:
            self.row_weights.remove()
        self.row_weights = None


def is_mean_over_positions(gradient: Tensor, logits: Tensor) -> bool | None:
    """Whether a cross-entropy of sequences is a mean over scored positions; False for a mean over rows.

    The gradient at a scored position is ``c (softmax - onehot)``: ``c`` is the same everywhere for a mean over
    positions, and falls as one over the row's length for a mean over rows.

    Args:
        gradient: Floating ``[k, T, V]``, gradient of the loss with respect to the logits.
        logits: ``[k, T, V]``.

    Returns:
        None where the rows do not tell: all lengths are equal, or neither fits much better.

    Example:
        >>> logits, targets = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([[0, 1, 2], [3, -100, -100]])
        >>> loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        >>> is_mean_over_positions(*torch.autograd.grad(loss, logits), logits)
        True
    """
    coefficients, lengths = [], []
    for g, x in zip(gradient.detach(), logits.detach(), strict=True):
        scored = g.ne(0).any(-1)
        target = g.argmin(-1, keepdim=True)  # the only negative entry
        others = 1 - x.float().softmax(-1).gather(-1, target)[:, 0]
        coefficients.append((g.float().clamp(min=0).sum(-1) * scored).sum() / (others * scored).sum())
        lengths.append(scored.sum())
    c, n = torch.stack(coefficients).double().cpu(), torch.stack(lengths).double().cpu()
    c, n = c[n > 0], n[n > 0]
    if len(n) < 2 or float(n.min()) == float(n.max()) or not bool((c > 0).all()):
        return None
    over_positions, over_rows = float(c.log().std()), float((c * n).log().std())
    if max(over_positions, over_rows) < 4 * min(over_positions, over_rows):
        return None
    return over_positions < over_rows
