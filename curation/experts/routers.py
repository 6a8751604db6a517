"""The routers of a model, and their outputs in one form."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curation.checks import check_choice, check_integer, check_text
from curation.experts import load_balancing as lb
from curation.experts.router_scores import CANDIDATES, Scores, called_scores, fitting_scores

TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k")  # names in configurations
BIAS = ("e_score_correction_bias", "expert_bias")  # names in DeepSeek-V3 and its relatives
ADAPTER = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)$")  # names of what peft wraps


@dataclass
class Router:
    """A module that chooses experts.

    Attributes:
        name: Name of the module in the model.
        module: The module. It returns logits ``[..., E]``, alone or in a tuple, possibly with the chosen indices.
        top_k: Number of experts per token; None where the module returns their indices.
        scores: How logits become probabilities, see :func:`~curation.experts.load_balancing.probabilities`; None
            while that is not known.
        position: Position of the logits in a tuple; None for the widest floating-point tensor that is not of the
            chosen experts only.
        block: The module that contains the router, and in some models its bias.
        inferred: Whether ``scores`` was read from the code of the module, and is to be checked by its weights.
        decoder: Whether the module is in the decoder of a model that also has an encoder.
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
    scores: Scores | None
    position: int | None = None
    block: nn.Module | None = None
    inferred: bool = False
    decoder: bool = False
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
        logits, _, integers = self._tensors(output)
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

    def _tensors(self, output: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The logits in an output, its other floating-point tensors, and its integer tensors."""
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        integers = [p for p in tensors if p.dim() > 1 and not p.is_floating_point() and p.dtype != torch.bool]
        floats = candidates = [p for p in tensors if p.dim() > 1 and p.is_floating_point()]
        if self.position is not None and len(parts) > self.position:
            candidates = [p for p in floats if p is parts[self.position]]
        elif any(p.size(-1) == self.top_k for p in integers):
            candidates = [p for p in floats if p.size(-1) != self.top_k]
        if not candidates:
            raise TypeError(
                f"The router {self.name} must put out logits [..., E], but put out {type(output).__name__}."
            )
        logits = max(candidates, key=lambda p: p.size(-1))
        return logits, [p for p in floats if p is not logits], integers

    def probabilities(self, logits: Tensor, mask: Tensor | None = None, output: Any = None) -> Tensor:
        """The probabilities of all experts.

        The first call finds out whether the module returns probabilities already, and sets ``scores`` to ``"none"``
        then; if not, and ``scores`` was read from the code, it checks them by the weights of the chosen experts. It
        waits for the device; later calls do not.

        Args:
            logits: ``[N, E]``.
            mask: bool ``[N]``, True for tokens that count; None if all do. Other rows of ``logits`` may be anything.
            output: What the module returned.

        Returns:
            fp32 ``[N, E]``, with gradient; 0 for tokens that do not count.

        Raises:
            ValueError: If neither the code nor the weights tell the scores, or the output does not tell which experts
                are used.
        """
        if not self.scores_checked and len(logits) and (mask is None or bool(mask.any())):
            self._check_scores(logits.detach(), mask, output)
            self.scores_checked = True
        scores = self.scores or "softmax"  # of tokens that do not count
        if mask is None:
            return lb.probabilities(logits, scores)
        # Masked before and after: padding may be NaN, and 0 times NaN is NaN.
        return lb.probabilities(logits.masked_fill(~mask[:, None], 0), scores) * mask[:, None]

    def _check_scores(self, logits: Tensor, mask: Tensor | None, output: Any) -> None:
        rows = logits.float() if mask is None else logits[mask].float()
        if bool((rows >= 0).all() & ((rows.sum(-1) - 1).abs() < 1e-2).all()):
            self.scores = "none"
            return
        chosen = self._weights(logits, output)
        if self.inferred and chosen is not None:
            indices, weights = chosen if mask is None else (chosen[0][mask], chosen[1][mask])
            errors = fitting_scores(rows, indices, weights)
            best = sorted(errors, key=errors.__getitem__)
            exact = self.scores is None or torch.finfo(weights.dtype).eps < 1e-4  # rounding does not outvote the code
            if best and exact and self.scores not in errors:
                clear = len(best) == 1 or 2 * errors[best[0]] < errors[best[1]]
                self.scores = best[0] if clear else None  # type: ignore[assignment]
        if self.scores is None:
            raise ValueError(
                f"Argument `scores` must be given: neither the code of the router {self.name} nor the weights that "
                f"it returns tell whether its logits become probabilities by {' or '.join(CANDIDATES)}."
            )

    def _weights(self, logits: Tensor, output: Any) -> tuple[Tensor, Tensor] | None:
        """The chosen experts in an output and their weights, both ``[N, k]``; None if it has no weights."""
        if output is None:
            return None
        _, floats, _ = self._tensors(output)
        _, indices = self.read(output)
        if hasattr(unwrapped(self.module), "num_router_classes"):  # Zaya: a class that is put out as expert 0
            raise ValueError(
                f"Argument `routers` must leave out {self.name}: its output does not tell which tokens skip all "
                "experts."
            )
        for part in floats:
            weights = part.detach().reshape(-1, part.size(-1))
            if len(weights) != len(logits):
                continue
            if weights.shape == indices.shape:
                return indices, weights
            if weights.shape == logits.shape:
                used = (weights != 0).sum(1)
                if int(used.max()) < logits.size(1) and bool((used > (indices >= 0).sum(1)).any()):
                    raise ValueError(
                        f"Argument `routers` must leave out {self.name}: its output names fewer experts of a token "
                        "than it gives weights to."
                    )
                return indices, weights.gather(1, indices.clamp(min=0))
        return None


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
            of the router calls, else that of what contains it; if neither calls one, ``"sigmoid"`` for a router with
            a bias for choosing alone. The weights that the router returns decide where they tell.

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
    check_choice("scores", scores, ("auto", *CANDIDATES, "none"))
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    modules = dict(model.named_modules())
    positions: dict[str, int | None] = {}
    if routers == "auto":
        declared = _declared_routers(model)
        positions = {n: at for n, m in modules.items() for cls, at in declared.items() if isinstance(m, cls)}
        for test in (_is_gate, _is_linear):
            if not positions:
                outer = {n: modules[_outer_name(n)] for n in modules}
                positions = {n: None for n, m in modules.items() if test(_outer_name(n), m, parents.get(outer[n]))}
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
    for name, position in {_outer_name(name): position for name, position in positions.items()}.items():
        module = modules[name]
        k = top_k or _top_k(unwrapped(module), parents)
        router = Router(name, module, k, None, position, parents.get(module))
        router.inferred, router.decoder = scores == "auto", _in_decoder(name, modules)
        router.scores = _scores(router) if scores == "auto" else scores
        result.append(router)
    return result


def _outer_name(name: str) -> str:
    """The name of the outermost module that adapts the module of a name: its output is the adapted one."""
    while ADAPTER.search(name):
        name = ADAPTER.sub("", name)
    return name


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that adapters of peft wrap."""
    for name, inner in module.named_modules():
        if _outer_name(f".{name}") == "" and not any(ADAPTER.search(f".{n}") for n, _ in inner.named_children()):
            return inner
    return module


def _in_decoder(name: str, modules: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    owners = [".".join(parts[:i]) for i, part in enumerate(parts) if part == "decoder"]
    return any(isinstance(getattr(modules[owner], "encoder", None), nn.Module) for owner in owners)


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


def _scores(router: Router) -> Scores | None:
    """The scores that the code tells; None where it has several."""
    bias = selection_bias(router) is not None
    called = called_scores(unwrapped(router.module))
    if not called and router.block is not None:
        called = called_scores(router.block)
        shared = any(getattr(child, "out_features", 0) == 1 for child in router.block.children())
        if len(called) > 1 and (bias or shared):
            called = {"sigmoid"} if bias else called - {"sigmoid"}  # a gate of a shared expert is a sigmoid, too
    if called:
        return called.pop() if len(called) == 1 else None
    return "sigmoid" if bias else "softmax"


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
    return bool(getattr(config, "output_router_logits", False)) and can_add_balancing_loss(config)


def can_add_balancing_loss(config: Any) -> bool:
    """Whether a model with this configuration adds a load-balancing loss where its router logits are asked for."""
    names = ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_coef", "moe_loss_weight")
    owners = [config, *(getattr(config, name, None) for name in ("ffn_config", "text_config"))]
    coefficients = [getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)]
    able = any(hasattr(owner, "output_router_logits") for owner in owners)
    return able and (not coefficients or any(coefficients))
