"""How the logits of a router become probabilities: by the code of the router, and by the weights that it returns."""

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curation.experts import load_balancing as lb

Scores = Literal["softmax", "sigmoid", "sqrtsoftplus", "none"]
FUNCTIONS = {"softmax": "softmax", "log_softmax": "softmax", "sigmoid": "sigmoid", "logsigmoid": "sigmoid"}
CANDIDATES = ("softmax", "sigmoid", "sqrtsoftplus")
DEPTH = 3  # functions that call functions


def called_scores(module: nn.Module) -> set[Any]:
    """The scores whose functions the forward pass of a module calls, itself or in its own methods and activations.

    Example:
        >>> called_scores(nn.Softmax(-1)), called_scores(nn.Linear(2, 2))
        ({'softmax'}, set())
    """
    return _called(type(module).forward, module, DEPTH)


def _called(function: Any, module: nn.Module, depth: int) -> set[Any]:
    function = inspect.unwrap(function)
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    result = {FUNCTIONS[name] for name in names if name in FUNCTIONS}
    if {"softplus", "sqrt"} <= set(names):
        result.add("sqrtsoftplus")
    for name in names if depth else ():
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            if not any(True for _ in part.parameters()):
                result |= _called(type(part).forward, part, depth - 1)
        elif getattr(part, "__name__", None) in FUNCTIONS:
            result.add(FUNCTIONS[part.__name__])  # type: ignore[union-attr]
        else:
            helper = function.__globals__.get(name) if part is None else getattr(part, "__func__", part)
            known = getattr(function, "__module__", ""), type(module).__module__
            if inspect.isfunction(helper) and helper.__module__ in known:
                result |= _called(helper, module, depth - 1)
    return result


@torch.no_grad()
def fitting_scores(logits: Tensor, indices: Tensor, weights: Tensor) -> dict[str, float]:
    """The scores that explain the weights of the chosen experts, and how far each is off.

    Weights may be scaled by a factor, which may differ from token to token where a token has several experts.

    Args:
        logits: ``[N, E]``.
        indices: int64 ``[N, k]``, the experts of each token; -1 for none.
        weights: ``[N, k]``, by which the outputs of the chosen experts are multiplied.

    Returns:
        The mean distance of logarithms, for those scores where it is small.

    Example:
        >>> logits, indices = torch.tensor([[0.0, 1.0, 2.0], [4.0, 0.0, 2.0]]), torch.tensor([[2, 1], [0, 2]])
        >>> list(fitting_scores(logits, indices, logits.sigmoid().gather(1, indices)))
        ['sigmoid']
    """
    rows = (indices >= 0).all(1) & (weights > 0).all(1)
    logits, indices, weights = logits[rows], indices[rows], weights[rows]
    if not len(logits):
        return {}
    tolerance = max(1e-3, 4 * torch.finfo(weights.dtype).eps)
    errors = {}
    for scores in CANDIDATES:
        p = lb.probabilities(logits, scores)
        if indices.size(1) == 1 and scores != "softmax":
            p = lb.raw_scores(logits, scores)  # only scores of tokens with several experts may be scaled
        ratio = weights.float().log() - p.gather(1, indices).log()
        error = (ratio - (ratio.mean(1, keepdim=True) if ratio.size(1) > 1 else ratio.mean())).abs().mean()
        if float(error) <= tolerance:
            errors[scores] = float(error)
    return errors
