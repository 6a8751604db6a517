"""A load-balancing loss over all tokens that an update is made of, for any mixture of experts."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from curation import rng
from curation.callbacks.experts.router_listener import Heard, Layer, RouterListener, stacked
from curation.callbacks.lightning.look_ahead import StepsAhead
from curation.callbacks.lightning.seam import refuse_strategies
from curation.experts import load_balancing as lb
from curation.experts.routers import Router, find_routers, selection_bias

OPTIONS = {
    "scope": ("micro", "sequence", "rank", "global"),
    "buffer": ("running", "warm", "deferred", "prepass"),
    "scores": ("auto", "softmax", "sigmoid"),
}


class GlobalBatchLoadBalancing(Callback):
    """Adds a load-balancing loss whose shares are those of all tokens between two steps of the optimizer.

    For each router ``E sum_i f_i P_i`` is added to the loss of every micro-batch, ``f`` over the micro-batches of all
    processes and ``P`` over its own tokens, weighed so that gradients add up to those of one large batch
    (arXiv 2501.11873). Only counts are synchronised, those of all layers at once. Evaluation is left alone, and so is
    the loss that the module returns and logs.

    Logs ``experts/loss``, the mean over layers; ``experts/max_load``, ``E max f`` of the worst layer;
    ``experts/dead``, the share of experts that were not chosen; and ``experts/projection``, by how much the loss
    exceeds 1, which can be 0 without balance: ``max_load`` tells. Shares are of all processes, and of the
    micro-batches since the last step.

    Args:
        coefficient: Of the sum over layers.
        scope: What is to be balanced: ``"global"``, all tokens of an update; ``"rank"``, those of a process;
            ``"micro"``, those of a micro-batch, as is usual elsewhere; or ``"sequence"``, those of each sequence.
        buffer: How a micro-batch knows of those that come after it. ``"running"``: not at all (the paper's);
            ``"warm"``: earlier windows stand for them; ``"deferred"``: as running, and just before the optimizer
            steps the gradients of the routers are corrected, exactly, for which their inputs are kept;
            ``"prepass"``: all of them go through the model in evaluation mode first, which is exact for all weights
            where the routers' choices do not depend on dropout.
        micro_fraction: Share of the loss that has the scope ``"micro"`` (0.01 in the paper).
        z_coefficient: Of the z-loss (arXiv 2202.08906).
        bias_rate: By how much a step changes the bias that some routers add for choosing alone (arXiv 2408.15664,
            0.001 there).
        routers: See :func:`~curation.experts.routers.find_routers`.
        top_k: Experts of a token, for all routers; None for what they say.
        scores: How logits become probabilities; ``"auto"`` for what the router does.
        mask: Which tokens count: the name of something ``[B, T]`` that is not 0 there, in batches that are mappings;
            or a function of the batch; None for all.
        accumulate: Micro-batches of an update, where the module optimizes by hand.

    Raises:
        ValueError: If an argument is out of its range, there is no router, or the model adds such a loss itself.
        RuntimeError: If routers do not fire where they should.
    """

    def __init__(
        self,
        coefficient: float = 0.008,
        scope: Literal["global", "rank", "micro", "sequence"] = "global",
        buffer: Literal["running", "warm", "deferred", "prepass"] = "running",
        micro_fraction: float = 0.0,
        z_coefficient: float = 0.0,
        bias_rate: float = 0.0,
        routers: str | Callable[[str, nn.Module], bool] = "auto",
        top_k: int | None = None,
        scores: Literal["auto", "softmax", "sigmoid"] = "auto",
        mask: str | Callable[[Any], Tensor] | None = "attention_mask",
        accumulate: int = 1,
    ) -> None:
        for name, choice in (("scope", scope), ("buffer", buffer), ("scores", scores)):
            if choice not in OPTIONS[name]:
                raise ValueError(f"Argument `{name}` must be one of {', '.join(OPTIONS[name])}, but got {choice!r}.")
        rates = {"coefficient": coefficient, "z_coefficient": z_coefficient, "bias_rate": bias_rate}
        for name, rate in rates.items():
            if not 0 <= rate < float("inf"):
                raise ValueError(f"Argument `{name}` must be in [0, inf), but got {rate!r}.")
        if not 0 <= micro_fraction <= 1:
            raise ValueError(f"Argument `micro_fraction` must be in [0, 1], but got {micro_fraction!r}.")
        for name, number in (("top_k", top_k), ("accumulate", accumulate)):
            if number is not None and not (hasattr(number, "__index__") and number >= 1):
                raise ValueError(f"Argument `{name}` must be an integer >= 1, but got {number!r}.")
        if buffer != "running" and scope != "global":
            raise ValueError(f"Argument `buffer` must be 'running' with the scope {scope!r}, but got {buffer!r}.")
        self.coefficient = coefficient
        self.scope = scope
        self.buffer = buffer
        self.micro_fraction = micro_fraction
        self.z_coefficient = z_coefficient
        self.bias_rate = bias_rate
        self.routers = routers
        self.top_k = top_k
        self.scores = scores
        self.mask = mask
        self.accumulate = accumulate
        self.found: list[Router] = []
        self._listener: RouterListener | None = None
        self._state: dict[str, Any] | None = None
        self._reset()

    def _reset(self) -> None:
        self.window = lb.Window(self.buffer == "warm")  # of all processes
        self.own = lb.Window()  # of this one
        self._kept: list[Heard] = []  # in the window, for the exact gradients
        self._left = 0.0  # micro-batches of the epoch after this one
        self._ahead: StepsAhead | None = None
        self._exact: tuple[Tensor, int] | None = None  # counts of the window, and its micro-batches, known beforehand
        self._ending: list[Any] = []  # the optimizers that have routers
        self._logged: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ the routers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            refuse_strategies(trainer, self)
            self._state = None
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, and listen to them."""
        self.found = find_routers(pl_module, self.routers, self.top_k, self.scores)
        for module in pl_module.modules():
            if _adds_its_own(getattr(module, "config", None)):
                raise ValueError(
                    f"{type(module).__name__} adds a load-balancing loss itself: set `config.output_router_logits` "
                    "to False, or leave GlobalBatchLoadBalancing out."
                )
        biases = [bias for router in self.found if (bias := selection_bias(router)) is not None]
        if self.bias_rate and not biases:
            raise ValueError(
                f"Argument `bias_rate` must be 0 where no router has a bias, but got {self.bias_rate!r}."
            )
        if self.buffer == "deferred" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "Argument `buffer` must not be 'deferred', which needs whole gradients, with "
                f"{type(trainer.strategy).__name__}."
            )
        if self.buffer == "prepass":
            self._ahead = StepsAhead(trainer, pl_module)  # now, so that those who need the loader itself have had it
        self._listener = RouterListener(
            self.found, self.buffer == "deferred", self.scope == "sequence", self.z_coefficient > 0
        )
        rank_zero_info(
            f"GlobalBatchLoadBalancing: {len(self.found)} routers, {self.found[0].name} to {self.found[-1].name}."
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know which optimizers end a window; go on in that of a checkpoint."""
        # Whether or not it is their turn: `toggle_optimizer` freezes what is not.
        ours = {id(p) for router in self.found for p in router.module.parameters()}
        self._ending = [
            optimizer
            for optimizer in trainer.optimizers
            if any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        ]
        for router in self.found if self.bias_rate else []:
            bias = selection_bias(router)
            if bias is not None and (bias.dtype != torch.float32 or isinstance(bias, DTensor) or not bias.numel()):
                raise ValueError(
                    "Argument `bias_rate` must be 0 where a bias is not a whole fp32 tensor, but that of "
                    f"{router.name} is {bias.dtype}, {type(bias).__name__}."
                )
        if self._state is not None:
            device = trainer.strategy.root_device
            self.window.load_state_dict(self._state["window"], device)
            self.own.load_state_dict(self._state["own"], device)
            exact = self._state["exact"]
            self._exact = None if exact is None else (exact[0].to(device), exact[1])
            self._state = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Know which tokens count."""
        listener = self._listening()
        listener.begin(not trainer.fit_loop._skip_backward)
        self._left = trainer.num_training_batches - batch_idx - 1
        if self.buffer == "prepass" and self.window.closed and listener.open:
            self._exact = self._try(trainer, batch, batch_idx)
        listener.mask = self._mask_of(batch)

    def _listening(self) -> RouterListener:
        assert self._listener is not None
        return self._listener

    def _mask_of(self, batch: Any) -> Tensor | None:
        if callable(self.mask):
            return self.mask(batch)
        return batch[self.mask] != 0 if isinstance(batch, Mapping) and self.mask in batch else None

    def _length(self, trainer: Trainer, pl_module: LightningModule) -> tuple[int, int]:
        """Micro-batches by which an update is divided, and those that this window will have."""
        length = trainer.accumulate_grad_batches if pl_module.automatic_optimization else self.accumulate
        return length, int(min(length, (0 if self.window.closed else self.window.size) + 1 + self._left))

    def _try(self, trainer: Trainer, batch: Any, batch_idx: int) -> tuple[Tensor, int]:
        """Count the choices of a window before it."""
        listener, total = self._listening(), torch.zeros((), dtype=torch.int64)
        assert self._ahead is not None
        _, coming = self._length(trainer, trainer.lightning_module)
        listener.trying = True
        try:
            for tried, one in enumerate(self._ahead.steps(batch, batch_idx, coming), 1):
                listener.mask = self._mask_of(one)
                counts = stacked(listener.layers(listener.take()))
                total = counts if tried == 1 else total + counts
        finally:
            listener.trying = False
        return _sum(trainer, total), tried

    # ------------------------------------------------------------------ the loss

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the loss of what the routers did since the last backward pass."""
        listener = self._listening()
        listener.backward = True
        heard = listener.take()
        if heard:  # else it is a loss without the model
            with torch.autocast(loss.device.type, enabled=False):
                added = self._added(trainer, pl_module, heard)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            added = (added if scaler is None else scaler.scale(added)).to(loss.dtype)
            # In place, since this very tensor is differentiated next. Its value stays, and so does what was saved.
            with torch.autograd._unsafe_preserve_version_counter(loss):
                loss.add_(added - added.detach())

    def _added(self, trainer: Trainer, pl_module: LightningModule, heard: list[Heard]) -> Tensor:
        layers = self._listening().layers(heard)
        counts = stacked(layers)
        of_all = _sum(trainer, counts.clone())
        length, coming = self._length(trainer, pl_module)
        f = self.window.add(of_all, coming)
        weight = trainer.world_size * counts[:, -1] / of_all[:, -1].clamp(min=1)
        if self._exact is not None:
            whole, size = self._exact
            f = lb.shares(whole[:, :-1])
            weight = trainer.world_size * size * counts[:, -1] / whole[:, -1].clamp(min=1)
        if self.scope == "rank":
            f = self.own.add(counts, coming)
        if self.scope != "global":
            weight = torch.ones_like(weight)
        added, losses = torch.zeros((), device=counts.device), []
        for i, layer in enumerate(layers):
            micro = lb.load_balancing_loss(lb.shares(layer.counts), layer.mean)
            of_scope = {"micro": micro, "sequence": layer.sequences}.get(self.scope)
            if of_scope is None:
                of_scope = lb.load_balancing_loss(f[i, : len(layer.counts)], layer.mean)
            share = self.micro_fraction
            added = added + self.coefficient * ((1 - share) * weight[i] * of_scope + share * micro)
            added = added + self.z_coefficient * layer.z
            losses.append(of_scope.detach())
        for one in heard if self.buffer == "deferred" else []:
            layer = layers[one.router]
            f_i, n = f[one.router, : len(layer.counts)], layer.tokens.clamp(min=1)
            one.pull = self._strength(length) * len(f_i) * weight[one.router] / n * f_i
            one.inputs, one.output = tree_map_only(Tensor, Tensor.detach, one.inputs), None
            self._kept.append(one)
        self._note(layers, losses)
        return added / length

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen again."""
        self._listening().backward = False

    def _strength(self, length: int) -> float:
        return self.coefficient * (1 - self.micro_fraction) / length

    # ------------------------------------------------------------------ the step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Correct the gradients of routers, and end the window, if this is the optimizer of routers."""
        if self._ending and not any(optimizer is one for one in self._ending):
            return
        if self._kept:
            listener = self._listening()
            listener.backward = True  # routers run again
            # Optimizers that scale by themselves still have scaled gradients.
            scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
            scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
            with rng.isolated():  # routers may be noisy
                self._correct(trainer, pl_module, scaler.scale if scaled else lambda x: x)
            listener.backward = False
        self._kept, self._exact = [], None
        if self.bias_rate and not self.window.closed:
            self._move_biases()
        self.window.closed = self.own.closed = True

    @torch.enable_grad()
    def _correct(self, trainer: Trainer, pl_module: LightningModule, scale: Callable[[Tensor], Tensor]) -> None:
        """Add the gradient by the shares of the whole window, less that by the shares there were."""
        length, _ = self._length(trainer, pl_module)
        assert self.window.counts is not None
        f, tokens = self.window.shares(), self.window.counts[:, -1].clamp(min=1)
        strength = self._strength(length) * trainer.world_size * self.window.size
        parameters = {i: [p for p in r.module.parameters() if p.requires_grad] for i, r in enumerate(self.found)}
        lost: dict[int, Tensor] = {}
        for kept in self._kept:
            if not parameters[kept.router]:
                continue
            assert kept.pull is not None
            router, experts = self.found[kept.router], len(kept.pull)
            exact = strength * experts / tokens[kept.router] * f[kept.router, :experts]
            assert kept.inputs is not None
            args, named = tree_map_only(Tensor, partial(_alike, parameters[kept.router][0]), kept.inputs)
            with torch.autocast(exact.device.type, enabled=False):
                logits, _ = router.read(router.module(*args, **named))
                if kept.mask is not None:
                    logits = logits.masked_fill(~kept.mask[:, None], 0)
                p = lb.probabilities(logits, self._listening().scores[kept.router])
                p = p if kept.mask is None else p * kept.mask[:, None]
                lost[kept.router] = lost.get(kept.router, 0) + (p * (exact - kept.pull)).sum()
        those = [p for i in lost for p in parameters[i]]
        if not those:
            return
        of_each = [torch.ones_like(value) for value in lost.values()]
        found = torch.autograd.grad(list(lost.values()), those, of_each, allow_unused=True, materialize_grads=True)
        whole = scale(_sum(trainer, torch.cat([g.float().flatten() for g in found])) / trainer.world_size)
        for parameter, part in zip(those, whole.split([p.numel() for p in those]), strict=True):
            gradient = part.view_as(parameter).to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _move_biases(self) -> None:
        """Up where an expert was chosen less than the average (arXiv 2408.15664, algorithm 1)."""
        assert self.window.counts is not None
        for router, counts in zip(self.found, self.window.counts[:, :-1], strict=True):
            bias = selection_bias(router)
            if bias is not None:
                c = counts[: len(bias)].float()
                bias.data.add_((c.mean() - c).sign().to(bias.dtype), alpha=self.bias_rate)

    # ------------------------------------------------------------------ what is told

    @torch.no_grad()
    def _note(self, layers: list[Layer], losses: list[Tensor]) -> None:
        f = self.window.shares()
        loads, dead, excess = [], [], []
        for i, layer in enumerate(layers):
            f_i = f[i, : len(layer.counts)]
            loads.append(f_i.max() * len(f_i))
            dead.append((f_i == 0).float().mean())
            excess.append(lb.projection(f_i, layer.mean))
        self._logged = {
            "loss": torch.stack(losses).mean(),
            "max_load": torch.stack(loads).max(),
            "dead": torch.stack(dead).mean(),
            "projection": torch.stack(excess).mean(),
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the loss and the loads."""
        self._listening().end(pl_module)
        for name, value in self._logged.items():
            pl_module.log(f"experts/{name}", value, on_step=True, on_epoch=False, batch_size=1)
        self._logged = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no longer."""
        if self._ahead is not None:
            self._ahead.teardown(trainer, pl_module, stage)
            self._ahead = None
        self.found = []
        if self._listener is not None:
            self._listener.remove()
        self._listener, self._kept, self._ending = None, [], []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As :meth:`teardown`, which Lightning does not call then."""
        self.teardown(trainer, pl_module, "")

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The counts of the window, so that a run may be resumed in the middle of one."""
        exact = None if self._exact is None else (self._exact[0].cpu(), self._exact[1])
        return {"window": self.window.state_dict(), "own": self.own.state_dict(), "exact": exact}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them, in a fit."""
        self._state = dict(state_dict)


def _sum(trainer: Trainer, values: Tensor) -> Tensor:
    """Over processes, in place; without the barrier of Lightning's own, which would make the host wait."""
    if trainer.world_size > 1:
        dist.all_reduce(values)
    return values


def _adds_its_own(config: Any) -> bool:
    """Whether a model of transformers adds a loss for the balance of its experts."""
    names = ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_coef", "moe_loss_weight")
    owners = (config, getattr(config, "ffn_config", None))
    found = [getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)]
    return bool(getattr(config, "output_router_logits", False)) and (not found or any(found))


def _alike(weight: Tensor, x: Tensor) -> Tensor:
    """Of the weight's dtype, if it is floating."""
    return x.to(weight.dtype) if x.is_floating_point() else x
