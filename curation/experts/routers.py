"""Where the routers of a model are, and what they put out."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Scores = Literal["softmax", "sigmoid", "none"]
TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k")
BIAS = ("e_score_correction_bias", "expert_bias")  # of DeepSeek-V3 and its kin


@dataclass
class Router:
    """A module that chooses experts.

    Attributes:
        name: Of the module.
        module: It puts out logits ``[..., E]``, alone or in a tuple, maybe with the indices of what it chose.
        top_k: Experts of a token; None where the module puts out their indices.
        scores: See :func:`~curation.experts.load_balancing.probabilities`.
        at: The place of the logits in a tuple; None for the widest floating tensor that is not of the chosen only.
        block: What it is in, and where some keep its bias.
    """

    name: str
    module: nn.Module
    top_k: int | None
    scores: Scores
    at: int | None = None
    block: nn.Module | None = None

    def read(self, output: Any) -> tuple[Tensor, Tensor]:
        """Logits ``[N, E]`` and the experts of each token, int64 ``[N, k]`` and -1 for none, of what was put out.

        Raises:
            TypeError: If there are no logits in it.
            ValueError: If there are no indices in it and ``top_k`` is not known.
        """
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        integers = [p for p in tensors if p.dim() > 1 and not p.is_floating_point() and p.dtype != torch.bool]
        floats = [p for p in tensors if p.dim() > 1 and p.is_floating_point()]
        if self.at is not None and len(parts) > self.at:
            floats = [p for p in floats if p is parts[self.at]]
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
            chosen = rows.argmax(-1, keepdim=True)  # one-hot, of one expert; none where its capacity was used up
            return logits, chosen.where(rows.any(-1, keepdim=True), -1)
        if self.top_k is None:
            raise ValueError(
                f"Argument `top_k` must be given: the router {self.name} puts out no indices of the experts, and "
                f"neither it nor what it is in has any of {', '.join(TOP_K)}."
            )
        return logits, logits.detach().topk(self.top_k, dim=-1).indices


def find_routers(
    model: nn.Module,
    how: str | Callable[[str, nn.Module], bool] = "auto",
    top_k: int | None = None,
    scores: Scores | Literal["auto"] = "auto",
) -> list[Router]:
    """The routers of a model, in the order of its modules.

    Args:
        model: Anything.
        how: ``"auto"``: what a model of transformers says of itself (``_can_record_outputs``), then classes whose
            name ends in Router, Gate or Gating, in which or beside which something is named for experts, then linear
            layers named ``router`` or ``gate`` beside ``experts``. Else a regular expression for names of modules, or
            a function of name and module.
        top_k: Of all routers; None for what they or what they are in say.
        scores: Of all routers; ``"auto"`` takes what their forward pass calls, and if that is neither, sigmoids where
            there is a bias for choosing alone.

    Raises:
        ValueError: If there is none.
    """
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    named = dict(model.named_modules())
    places: dict[str, int | None] = {}
    if how == "auto":
        recorded = _recorded(model)
        places = {n: at for n, m in named.items() for cls, at in recorded.items() if isinstance(m, cls)}
        for test in (_is_gate, _is_linear):
            if not places:
                places = {n: None for n, m in named.items() if test(n, m, parents.get(m))}
    elif callable(how):
        places = {n: None for n, m in named.items() if how(n, m)}
    else:
        places = {n: None for n in named if re.search(how, n)}
    if not places:
        raise ValueError(
            f"Argument `routers` must name the routers of {type(model).__name__}, but {how!r} finds none. Give a "
            "regular expression for their names, or a function of name and module."
        )
    found = []
    for name, at in places.items():
        module = named[name]
        router = Router(name, module, top_k or _top_k(module, parents), "softmax", at, parents.get(module))
        router.scores = _scores(router) if scores == "auto" else scores
        found.append(router)
    return found


def _recorded(model: nn.Module) -> dict[type, int]:
    """Classes of routers, and the place of the logits in what they put out, as models of transformers say."""
    found: dict[type, int] = {}
    for module in model.modules():
        declared = getattr(type(module), "_can_record_outputs", None) or {}
        entries = declared.get("router_logits", []) if isinstance(declared, dict) else []
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            cls = getattr(entry, "target_class", entry)
            if isinstance(cls, type) and re.search(r"Rout|Gat", cls.__name__):
                found[cls] = getattr(entry, "index", 0)
    return found


def _is_gate(name: str, module: nn.Module, parent: nn.Module | None) -> bool:
    if not re.search(r"(Router|Gate|Gating)$", type(module).__name__) or not any(True for _ in module.parameters()):
        return False
    near = [vars(m) | m._modules | m._parameters for m in (module, parent) if m is not None]
    return any("expert" in key for keys in near for key in keys)


def _is_linear(name: str, module: nn.Module, parent: nn.Module | None) -> bool:
    named = name.rpartition(".")[2] in ("router", "gate")
    return named and isinstance(module, nn.Linear) and module.out_features > 1 and hasattr(parent, "experts")


def _top_k(module: nn.Module, parents: dict[nn.Module, nn.Module]) -> int | None:
    at: nn.Module | None = module
    while at is not None:
        for owner in (at, getattr(at, "config", None)):
            for key in TOP_K:
                value = getattr(owner, key, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        at = parents.get(at)
    return None


def _scores(router: Router) -> Scores:
    code = getattr(inspect.unwrap(type(router.module).forward), "__code__", None)
    called = code.co_names if code else ()  # a bias does not tell: Ernie's and LongCat's is beside a softmax
    if "softmax" in called or "sigmoid" in called:
        return "softmax" if "softmax" in called else "sigmoid"
    return "softmax" if selection_bias(router) is None else "sigmoid"


def selection_bias(router: Router) -> Tensor | None:
    """The bias fp32 ``[E]``, in place, that is added for choosing alone; None where there is none."""
    own = [*router.module.named_buffers(), *router.module.named_parameters()]
    if router.block is not None:
        own += [*router.block.named_buffers(recurse=False), *router.block.named_parameters(recurse=False)]
    for name, value in own:
        if name.rpartition(".")[2] in BIAS and value.numel() == value.size(-1):
            return value.detach().view(-1)
    return None
