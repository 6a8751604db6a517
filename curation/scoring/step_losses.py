"""The losses of the rows of a batch, read from a training step whose own loss is a mean over them."""

import copy
import inspect
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curation.batch import batch_size, copied, leaves, take_rows
from curation.scoring.losses import IGNORED

EXACT = 1e-3  # relative, of half precision
AUXILIARY = 0.05  # share of the loss that may be no mean over rows: it changes no ranking
_LOSSES = {
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.cosine_embedding_loss, F.cross_entropy,
    F.gaussian_nll_loss, F.hinge_embedding_loss, F.huber_loss, F.kl_div, F.l1_loss, F.margin_ranking_loss,
    F.mse_loss, F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss, F.nll_loss,
    F.poisson_nll_loss, F.smooth_l1_loss, F.soft_margin_loss, F.triplet_margin_loss,
    F.triplet_margin_with_distance_loss,
}  # fmt: skip
_MEANS = {
    torch.mean: True,
    Tensor.mean: True,
    torch.sum: False,
    Tensor.sum: False,
}  # whether they divide by the number of entries


class StepLosses:
    """Runs the ``training_step`` of a module and splits its loss over the rows of the batch.

    A loss is split where it is a sum, with any weights, of losses of ``torch.nn.functional`` (and so of ``torch.nn``)
    over tensors with the batch's rows in front, or of means and sums over such tensors. What else is in it may be
    at most 5 % of it. The weights are read by automatic differentiation from the terms to the loss; the model is not
    differentiated. The step runs without gradients, as :func:`~curation.scoring.side_effect_free` lets it; lists,
    mappings and sets that are attributes of the module are put back as they were.

    Args:
        module: A LightningModule with automatic optimization.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._means: bool | None = None  # whether means and sums are terms, too; None before it is known
        self._found = 0  # terms of the last step

    def __call__(self, batch: Any) -> Tensor:
        """The losses of the rows, fp32 ``[B]``.

        Raises:
            TypeError: If the loss is not known to be made of losses of rows.
        """
        if self._means is None:  # a formula beside a loss is no auxiliary term where it can be split, too
            tried = list(itertools.product((EXACT, AUXILIARY), (False, True)))
        else:  # the terms are those of the first batch: a fit does not end because one grows
            tried = [(math.inf, self._means)]
        for tolerance, means in tried:
            try:
                losses = self._run(batch, means, tolerance)
            except Exception as error:  # of the step, which may need what is not there outside a step
                reason = f"it raised {type(error).__name__}: {error}"
                raise no_losses(self.module, batch, reason) from error
            if losses is not None and (self._means is not None or not means or self._are_of_rows(batch)):
                self._means = means
                return losses
        raise no_losses(self.module, batch, "it does not return a sum of losses of rows")

    def _are_of_rows(self, batch: Any) -> bool:
        """Whether the means are over the rows of the batch: a weight may have as many rows by chance."""
        size, found = batch_size(batch), self._found
        device = next(leaf.device for _, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
        if size > 1:
            self._run(take_rows(batch, torch.arange(size - 1, device=device)), True, math.inf)
        return self._found == found

    def _run(self, batch: Any, means: bool, tolerance: float) -> Tensor | None:
        size = batch_size(batch)
        step: Any = self.module.training_step
        arguments = [batch if self._means is not None else copied(batch)]  # one of several attempts
        if takes_index(step):
            arguments.append(-1)  # steps often log pictures of the batch 0, or of every n-th
        terms = _Terms(size, means)
        with _containers_restored(self.module), torch.no_grad(), terms:
            output = step(*arguments)
        self._found = len(terms.found)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not terms.found:
            return None
        return terms.split(loss, tolerance)


class _Terms(TorchFunctionMode):
    """Remembers the losses of rows that a step reduces, and from the first on the arithmetic with the results."""

    def __init__(self, size: int, means: bool) -> None:
        super().__init__()
        self.size, self.means = size, means
        self.found: list[tuple[Tensor, Tensor]] = []  # losses of the rows [B], and their reduction, a leaf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not (isinstance(result, Tensor) and result.dim() == 0 and result.is_floating_point()):
            return result
        rows = None
        if func in _LOSSES:
            rows = self._of_loss(func, args, kwargs)
        elif self.means and func in _MEANS and len(args) == 1 and not kwargs.keys() - {"input", "dtype"}:
            rows = self._of_mean(args[0], _MEANS[func])
        if rows is None:
            return result
        leaf = result.detach().requires_grad_()
        self.found.append((rows.detach().float(), leaf))
        torch.set_grad_enabled(True)  # until the step ends
        return leaf

    def _of_loss(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        if any(options.get(name) is not None for name in ("size_average", "reduce")):
            return None
        summed = options["reduction"] == "sum"
        with torch.no_grad():
            losses = func(**{**options, "reduction": "none"})
            if losses.dim() == 0 or len(losses) != self.size:
                return None
            target: Any = options.get("target")
            if func is F.kl_div and options["reduction"] == "batchmean":
                return losses.reshape(self.size, -1).sum(1)
            rows = self._of_mean(losses, not summed)
            classes = func in (F.cross_entropy, F.nll_loss) and not summed and not target.is_floating_point()
            if classes and rows is not None:
                scored = target.ne(options.get("ignore_index", IGNORED)).reshape(self.size, -1).float()
                weight = options["weight"]
                if weight is not None:  # a mean over the weights of the classes
                    scored = scored * weight[target.clamp(min=0)].reshape(self.size, -1)
                rows = losses.reshape(self.size, -1).sum(1) / scored.sum(1)
                if weight is not None and target.dim() == 1:  # of a row it would be 1
                    rows = losses * (self.size / scored.sum())
            return rows

    def _of_mean(self, losses: Any, divides: bool) -> Tensor | None:
        if not isinstance(losses, Tensor) or losses.dim() == 0 or len(losses) != self.size:
            return None
        rows = losses.detach().reshape(self.size, -1)
        return rows.mean(1) if divides else rows.sum(1) * self.size

    def split(self, loss: Tensor, tolerance: float) -> Tensor | None:
        """Losses of the rows, fp32 ``[B]``, whose mean is the loss; None where the terms do not make up the loss."""
        if not loss.requires_grad:
            return None
        leaves = [leaf for _, leaf in self.found]
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        used = [
            (rows, leaf.detach(), slope)
            for (rows, leaf), slope in zip(self.found, slopes, strict=True)
            if slope is not None
        ]
        if not used:
            return None
        whole = torch.stack([leaf * slope for _, leaf, slope in used]).sum()
        total = loss.detach().sum()
        if tolerance < math.inf and not bool((whole - total).abs() <= tolerance * total.abs() + 1e-6):
            return None
        return torch.stack([rows * slope for rows, _, slope in used]).sum(0)


@contextmanager
def _containers_restored(module: nn.Module) -> Iterator[None]:
    """Put attributes of a module, and the contents of its lists, mappings and sets, back as they were."""
    before = dict(vars(module))
    contents = {
        name: (value, copy.copy(value))
        for name, value in before.items()
        if isinstance(value, (list, dict, set, deque)) and not name.startswith("_")
    }
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)
        for value, content in contents.values():
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)


def takes_index(step: Callable[..., Any]) -> bool:
    """Whether a training step takes the index of the batch, under any name, as Lightning finds out."""
    parameters = inspect.signature(step).parameters.values()
    return len(parameters) > 1 or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)


def no_losses(module: nn.Module, batch: Any, reason: str = "it is not automatic") -> TypeError:
    """The error that says which method to add to a module, with the names and shapes of its batches.

    Args:
        module: The module.
        batch: A batch.
        reason: Why its ``training_step`` does not tell the losses.
    """
    fields = [(path, leaf) for path, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    names = [path.split(".")[1:] for path, _ in fields]
    if isinstance(batch, (list, tuple)) and len(fields) == len(batch):
        take = (
            ", ".join("x" if i == 0 else "y" if i == len(fields) - 1 else f"_{i}" for i in range(len(fields)))
            + " = batch"
        )
    elif len(fields) > 1:
        x, y = ("batch" + "".join(_index(part) for part in name) for name in (names[0], names[-1]))
        take = f"x, y = {x}, {y}"
    else:
        take = "x = y = batch" + ("" if not names else "".join(_index(part) for part in names[0]))
    shapes = ", ".join(f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for _, leaf in fields)
    classes = bool(fields) and not fields[-1][1].is_floating_point() and fields[-1][1].dtype != torch.bool
    loss = "cross_entropy" if classes else "mse_loss"
    return TypeError(
        f"The losses of the rows of a batch are not certain for `{type(module).__name__}`: they cannot be read from "
        f"its `training_step`, since {reason}. Add this method to it, with the prediction and the loss of "
        f"`training_step` in the places of `self(x)` and `{loss}`:\n\n"
        "    def score_step(self, batch):\n"
        f"        {take}  # {shapes}\n"
        f'        losses = torch.nn.functional.{loss}(self(x), y, reduction="none")\n'
        "        return losses.reshape(len(losses), -1).mean(1)  # one loss for each row\n\n"
        "For classes it may return `(logits, targets)` instead, logits [B, C] with targets [B], or [B, T, V] with "
        "[B, T]; target -100 marks positions to ignore."
    )


def _index(part: str) -> str:
    return f"[{part}]" if part.isdigit() else f'["{part}"]'


def can_run_step(module: nn.Module) -> bool:
    """Whether a module has a training step that changes nothing but by its loss."""
    step: Callable[..., Any] | None = getattr(module, "training_step", None)
    return callable(step) and bool(getattr(module, "automatic_optimization", False))
