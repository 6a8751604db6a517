"""The routers of a model, and their outputs in one form."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curation.checks import check_choice, check_integer, check_text
from curation.experts import load_balancing as lb

Scores = Literal["softmax", "sigmoid", "none"]
TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k")  # names in configurations
BIAS = ("e_score_correction_bias", "expert_bias")  # names in DeepSeek-V3 and its relatives


@dataclass
class Router:
    """A module that chooses experts.

    Attributes:
        name: Name of the module in the model.
        module: The module. It returns logits ``[..., E]``, alone or in a tuple, possibly with the chosen indices.
        top_k: Number of experts per token; None where the module returns their indices.
        scores: How logits become probabilities, see :func:`~curation.experts.load_balancing.probabilities`.
        position: Position of the logits in a tuple; None for the widest floating-point tensor that is not of the
            chosen experts only.
        block: The module that contains the router, and in some models its bias.
        scores_checked: Whether :meth:`probabilities` has looked at the logits.

    Example:
        >>> router = Router("gate", nn.Linear(8, 4), top_k=2, scores="softmax")
        >>> logits, indices = router.read(torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
        >>> indices.tolist()
        [[1, 2]]
    """

    name: str
    module: nn.Module
    top_k: int | None
    scores: Scores
    position: int | None = None
    block: nn.Module | None = None
    scores_checked: bool = False

    def read(self, output: Any) -> tuple[Tensor, Tensor]:
        """The logits and the chosen experts in an output of the module.

        Args:
            output: What the module returned.

        Returns:
            Logits ``[N, E]``, and the experts of each token, int64 ``[N, k]`` with -1 for none.

        Raises:
            TypeError: If the output contains no logits.
            ValueError: If the output contains no indices and ``top_k`` is unknown.
        """
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        integers = [p for p in tensors if p.dim() > 1 and not p.is_floating_point() and p.dtype != torch.bool]
        floats = [p for p in tensors if p.dim() > 1 and p.is_floating_point()]
        if self.position is not None and len(parts) > self.position:
            floats = [p for p in floats if p is parts[self.position]]
        elif any(p.size(-1) == self.top_k for p in integers):
            floats = [p for p in floats if p.size(-1) != self.top_k]
        if not floats:
            raise TypeError(
                f"The router {self.name} must put out logits [..., E], but put out {type(output).__name__}."
            )
        logits = max(floats, key=lambda p: p.size(-1))
        experts = logits.size(-1)
        logits = logits.reshape(-1, experts)
        for part in integers:
            rows = part.reshape(-1, part.size(-1))
            if len(rows) != len(logits):
                continue
            if part.size(-1) < experts or part.size(-1) == self.top_k:
                return logits, rows.long()
            chosen = rows.argmax(-1, keepdim=True)  # one-hot rows of one expert; zeros where its capacity was used up
            return logits, chosen.where(rows.any(-1, keepdim=True), -1)
        if self.top_k is None:
            raise ValueError(
                f"Argument `top_k` must be given: the router {self.name} puts out no indices of the experts, and "
                f"neither it nor what it is in has any of {', '.join(TOP_K)}."
            )
        return logits, logits.detach().topk(self.top_k, dim=-1).indices

    def probabilities(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The probabilities of all experts.

        The first call finds out whether the module returns probabilities already, and sets ``scores`` to ``"none"``
        then. It waits for the device; later calls do not.

        Args:
            logits: ``[N, E]``.
            mask: bool ``[N]``, True for tokens that count; None if all do. Other rows of ``logits`` may be anything.

        Returns:
            fp32 ``[N, E]``, with gradient; 0 for tokens that do not count.
        """
        if not self.scores_checked:
            rows = logits.detach().float()
            rows = rows if mask is None or not mask.any() else rows[mask]
            normalised = (rows >= 0).all() & ((rows.sum(-1) - 1).abs() < 1e-2).all()
            self.scores, self.scores_checked = "none" if bool(normalised) else self.scores, True
        if mask is None:
            return lb.probabilities(logits, self.scores)
        # Masked before and after: padding may be NaN, and 0 times NaN is NaN.
        return lb.probabilities(logits.masked_fill(~mask[:, None], 0), self.scores) * mask[:, None]


def find_routers(
    model: nn.Module,
    routers: str | Callable[[str, nn.Module], bool] = "auto",
    top_k: int | None = None,
    scores: Scores | Literal["auto"] = "auto",
) -> list[Router]:
    """The routers of a model, in the order of its modules.

    Args:
        model: Any module.
        routers: A regular expression for names of modules, or a function of name and module. ``"auto"`` takes what a
            model of transformers declares (``_can_record_outputs``), else classes whose name ends in Router, Gate or
            Gating and that contain or stand beside something named for experts, else linear layers named ``router``
            or ``gate`` beside ``experts``.
        top_k: Number of experts per token, for all routers; None for the value of the module or of what contains it.
        scores: How logits become probabilities, for all routers. ``"auto"`` takes the function that the forward pass
            of the router calls; if it calls none, ``"sigmoid"`` for a router with a bias for choosing alone.

    Raises:
        ValueError: If an argument is of the wrong type or out of its range, or there is no router.

    Example:
        >>> block = nn.Module()
        >>> block.gate, block.experts, block.top_k = nn.Linear(8, 4), nn.ModuleList(), 2
        >>> [(router.name, router.top_k, router.scores) for router in find_routers(block)]
        [('gate', 2, 'softmax')]
    """
    if not callable(routers):
        check_text("routers", routers)
    check_integer("top_k", top_k, 1, optional=True)
    check_choice("scores", scores, ("auto", "softmax", "sigmoid", "none"))
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    modules = dict(model.named_modules())
    positions: dict[str, int | None] = {}
    if routers == "auto":
        declared = _declared_routers(model)
        positions = {n: at for n, m in modules.items() for cls, at in declared.items() if isinstance(m, cls)}
        for test in (_is_gate, _is_linear):
            if not positions:
                positions = {n: None for n, m in modules.items() if test(n, m, parents.get(m))}
    elif callable(routers):
        positions = {n: None for n, m in modules.items() if routers(n, m)}
    else:
        positions = {n: None for n in modules if re.search(routers, n)}
    if not positions:
        raise ValueError(
            f"Argument `routers` must name the routers of {type(model).__name__}, but {routers!r} finds none. Give a "
            "regular expression for their names, or a function of name and module."
        )
    result = []
    for name, position in positions.items():
        module = modules[name]
        router = Router(name, module, top_k or _top_k(module, parents), "softmax", position, parents.get(module))
        router.scores = _scores(router) if scores == "auto" else scores
        result.append(router)
    return result


def _declared_routers(model: nn.Module) -> dict[type, int]:
    """Classes of routers and the position of the logits in their outputs, as models of transformers declare them."""
    positions: dict[type, int] = {}
    for module in model.modules():
        declared = getattr(type(module), "_can_record_outputs", None) or {}
        entries = declared.get("router_logits", []) if isinstance(declared, dict) else []
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            cls = getattr(entry, "target_class", entry)
            if isinstance(cls, type) and re.search(r"Rout|Gat", cls.__name__):
                positions[cls] = getattr(entry, "index", 0)
    return positions


def _is_gate(name: str, module: nn.Module, parent: nn.Module | None) -> bool:
    if not re.search(r"(Router|Gate|Gating)$", type(module).__name__) or not any(True for _ in module.parameters()):
        return False
    near = [vars(m) | m._modules | m._parameters for m in (module, parent) if m is not None]
    return any("expert" in key for keys in near for key in keys)


def _is_linear(name: str, module: nn.Module, parent: nn.Module | None) -> bool:
    named = name.rpartition(".")[2] in ("router", "gate")
    return named and isinstance(module, nn.Linear) and module.out_features > 1 and hasattr(parent, "experts")


def _top_k(module: nn.Module, parents: dict[nn.Module, nn.Module]) -> int | None:
    ancestor: nn.Module | None = module
    while ancestor is not None:
        for owner in (ancestor, getattr(ancestor, "config", None)):
            for key in TOP_K:
                value = getattr(owner, key, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        ancestor = parents.get(ancestor)
    return None


def _scores(router: Router) -> Scores:
    code = getattr(inspect.unwrap(type(router.module).forward), "__code__", None)
    called = code.co_names if code else ()  # a bias does not tell: Ernie and LongCat have one beside a softmax
    if "softmax" in called or "sigmoid" in called:
        return "softmax" if "softmax" in called else "sigmoid"
    return "softmax" if selection_bias(router) is None else "sigmoid"


def selection_bias(router: Router) -> Tensor | None:
    """The bias of a router that is added for choosing alone: a view of fp32 ``[E]``; None where there is none."""
    tensors = [*router.module.named_buffers(), *router.module.named_parameters()]
    if router.block is not None:
        tensors += [*router.block.named_buffers(recurse=False), *router.block.named_parameters(recurse=False)]
    for name, value in tensors:
        if name.rpartition(".")[2] in BIAS and value.numel() == value.size(-1):
            return value.detach().view(-1)
    return None


def adds_balancing_loss(config: Any) -> bool:
    """Whether a model of transformers with this configuration adds a load-balancing loss itself.

    Example:
        >>> from types import SimpleNamespace
        >>> adds_balancing_loss(SimpleNamespace(output_router_logits=True, router_aux_loss_coef=0.01))
        True
    """
    names = ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_coef", "moe_loss_weight")
    owners = (config, getattr(config, "ffn_config", None))
    coefficients = [getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)]
    return bool(getattr(config, "output_router_logits", False)) and (not coefficients or any(coefficients))
