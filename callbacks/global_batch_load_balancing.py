"""A load-balancing loss over all tokens that an update is made of, for any mixture of experts."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from curation.callbacks.look_ahead import LookAhead
from curation.callbacks.online_selection import OnlineSelection
from curation.callbacks.seam import BatchSeam, SeamClient
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from curation.experts import load_balancing as lb
from curation.experts.routers import Router, Scores, find_routers, selection_bias
from curation.replace import replace_attribute
from curation.scoring import side_effect_free

OPTIONS = {
    "scope": ("micro", "sequence", "rank", "global"),
    "buffer": ("running", "warm", "deferred", "prepass"),
    "scores": ("auto", "softmax", "sigmoid"),
}


@dataclass
class _Heard:
    """A forward pass of a router.

    Attributes:
        router: Its number.
        inputs: What went in, by position and by name.
        output: What came out.
        mask: Which tokens count, bool ``[N]``; None for all.
        pull: By how much each expert's probability of a token is in the loss, fp32 ``[E]``.
    """

    router: int
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    mask: Tensor | None = None
    pull: Tensor | None = None


@dataclass
class _Layer:
    """What a router did in a micro-batch, in all its forward passes.

    Attributes:
        counts: int64 ``[E]``.
        tokens: int64 scalar: those that count.
        mean: fp32 ``[E]``, of the probabilities of these, with gradient.
        sequences: Scalar: the loss of its sequences, where that is asked for.
        z: Scalar.
    """

    counts: Tensor
    tokens: Tensor
    mean: Tensor
    sequences: Tensor
    z: Tensor


class GlobalBatchLoadBalancing(Callback, SeamClient):
    """Adds a load-balancing loss whose shares are those of all tokens between two steps of the optimizer.

    For each router ``E sum_i f_i P_i`` is added to the loss of every micro-batch, ``f`` over the micro-batches of all
    processes and ``P`` over its own tokens, weighed so that gradients add up to those of one large batch
    (arXiv 2501.11873). Only counts are synchronised, those of all layers at once. Evaluation is left alone, and so is
    the loss that the module returns and logs.

    Logs ``experts/loss``, the mean over layers; ``experts/max_load``, ``E max f`` of the worst layer;
    ``experts/dead``, the share of experts that were not chosen; and ``experts/projection``, by how much the loss
    exceeds 1, which can be 0 without balance: ``max_load`` tells. They are of all processes and of the micro-batches
    since the last step.

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
        self._state: dict[str, Any] | None = None
        self._undo: list[Callable[[], None]] = []
        self._reset()

    def _reset(self) -> None:
        self.window = lb.Window(self.buffer == "warm")  # of all processes
        self.own = lb.Window()  # of this one
        self._heard: list[_Heard] = []
        self._kept: list[_Heard] = []  # in the window, for the exact gradients
        self._mask: Tensor | None = None
        self._scores: dict[int, Scores] = {}
        self._open = self._backward = self._trying = self._without_gradient = False
        self._left = 0.0  # micro-batches of the epoch after this one
        self._trainer: Trainer | None = None
        self._ahead: LookAhead | None = None
        self._exact: tuple[Tensor, int] | None = None  # counts of the window, and its micro-batches, known beforehand
        self._logged: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ the routers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self._state = None
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, and listen to them."""
        self.found = find_routers(pl_module, self.routers, self.top_k, self.scores)
        for module in pl_module.modules():
            config = getattr(module, "config", None)
            own = getattr(config, "router_aux_loss_coef", 0) or getattr(config, "router_z_loss_coef", 0)
            if own and getattr(config, "output_router_logits", False):
                raise ValueError(
                    f"{type(module).__name__} adds a load-balancing loss itself: set `config.output_router_logits` "
                    "to False, or leave GlobalBatchLoadBalancing out."
                )
        if self.bias_rate and all(selection_bias(router) is None for router in self.found):
            raise ValueError(
                f"Argument `bias_rate` must be 0 where no router has a bias, but got {self.bias_rate!r}."
            )
        if self.buffer == "deferred" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "Argument `buffer` must not be 'deferred', which needs whole gradients, with "
                f"{type(trainer.strategy).__name__}."
            )
        if self.buffer == "prepass":
            self._check_that_steps_can_be_tried(trainer, pl_module)
            self._trainer = trainer
            BatchSeam.attach(trainer, self)  # now, so that those who need the loader itself have had it
        self._undo = [
            router.module.register_forward_hook(self._hear(i), with_kwargs=True).remove
            for i, router in enumerate(self.found)
        ]
        rank_zero_info(
            f"GlobalBatchLoadBalancing: {len(self.found)} routers, {self.found[0].name} to {self.found[-1].name}."
        )
        if self._state is not None:
            device = trainer.strategy.root_device
            self.window.load_state_dict(self._state["window"], device)
            self.own.load_state_dict(self._state["own"], device)

    def _hear(self, number: int) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hear(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            if self._open and not self._backward:  # a backward pass may run it again
                if torch.is_grad_enabled() or self._trying:
                    self._heard.append(_Heard(number, (inputs, named), output))
                else:
                    self._without_gradient = True

        return hear

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Know which tokens count."""
        self._heard, self._backward, self._open = [], False, not trainer.fit_loop._skip_backward
        self._left = trainer.num_training_batches - batch_idx - 1
        if self.buffer == "prepass" and self.window.closed and self._open:
            self._exact = self._try(trainer, pl_module, batch, batch_idx)
        self._mask = self._mask_of(batch)

    def _mask_of(self, batch: Any) -> Tensor | None:
        if callable(self.mask):
            return self.mask(batch)
        return batch[self.mask] != 0 if isinstance(batch, Mapping) and self.mask in batch else None

    def _length(self, trainer: Trainer, pl_module: LightningModule) -> tuple[int, int]:
        """Micro-batches by which an update is divided, and those that this window will have."""
        length = trainer.accumulate_grad_batches if pl_module.automatic_optimization else self.accumulate
        return length, int(min(length, (0 if self.window.closed else self.window.size) + 1 + self._left))

    # ------------------------------------------------------------------ a pass before the window

    def _check_that_steps_can_be_tried(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError("Argument `buffer` must not be 'prepass' where the module optimizes by hand.")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(f"Argument `buffer` must not be 'prepass' with {type(trainer.strategy).__name__}.")
        others = [type(c).__name__ for c in trainer.callbacks if isinstance(c, OnlineSelection)]  # type: ignore[attr-defined]
        if others:
            raise ValueError(f"Argument `buffer` must not be 'prepass' beside {others[0]}, which changes batches.")

    def watch(self, dataloader: Any) -> Any:
        """Have the batches of a window at its beginning."""
        trainer = self._trainer
        assert trainer is not None
        self._ahead = LookAhead(dataloader, lambda: trainer.accumulate_grad_batches - 1)
        return self._ahead

    def _try(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> tuple[Tensor, int]:
        """Count the choices of a window without gradients and without a trace."""
        assert self._ahead is not None
        seam = BatchSeam.of(trainer)
        assert seam is not None
        _, coming = self._length(trainer, pl_module)
        batches = [batch, *(seam.transfer(other) for other in itertools.islice(self._ahead.queue, coming - 1))]
        quiet = [replace_attribute(pl_module, name, lambda *_, **__: None) for name in ("log", "log_dict")]
        self._trying = True
        try:
            total: Any = 0
            for i, one in enumerate(batches):
                self._mask = self._mask_of(one)
                named = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), one, batch_idx + i)
                with side_effect_free(pl_module), trainer.precision_plugin.train_step_context():
                    pl_module.training_step(**named)
                heard, self._heard = self._heard, []
                total = total + _counts(self._layers(heard))
        finally:
            self._trying = False
            for undo in quiet:
                undo()
        return trainer.strategy.reduce(total, reduce_op="sum"), len(batches)

    # ------------------------------------------------------------------ the loss

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the loss of what the routers did since the last backward pass."""
        self._backward = True
        heard, self._heard = self._heard, []
        if not heard:
            self._check_silence(pl_module)
            return
        layers = self._layers(heard)
        counts = _counts(layers)
        of_all = trainer.strategy.reduce(counts.clone(), reduce_op="sum")
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
        added, losses = torch.zeros((), device=loss.device), []
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
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        added = added / length
        added = added if scaler is None else scaler.scale(added)
        loss.add_(added.to(loss.dtype))  # in place, since this tensor is differentiated next
        self._note(layers, losses)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen again."""
        self._backward = False

    def _strength(self, length: int) -> float:
        return self.coefficient * (1 - self.micro_fraction) / length

    def _layers(self, heard: list[_Heard]) -> list[_Layer]:
        layers = []
        for i, router in enumerate(self.found):
            passes = [one for one in heard if one.router == i]
            if not passes:
                raise RuntimeError(
                    f"The router {router.name} did not fire where others did: leave it out of `routers`."
                )
            counts, tokens, total, sequences, z = [], [], [], [], []
            for one in passes:
                logits, indices = router.read(one.output)
                mask = one.mask = self._counted(router, len(logits))
                p = lb.probabilities(logits, self._kind(i, logits))
                n = mask.sum() if mask is not None else torch.full((), len(p), device=p.device)
                counts.append(lb.expert_counts(indices, p.size(1), mask))
                tokens.append(n)
                total.append(p.sum(0) if mask is None else mask.float() @ p)
                sequences.append(self._sequences(router, p, indices, mask))
                z.append(n * lb.z_loss(logits, mask) if self.z_coefficient else p.new_zeros(()))
            n = torch.stack(tokens).sum()
            mean, of_z = torch.stack(total).sum(0) / n.clamp(min=1), torch.stack(z).sum() / n.clamp(min=1)
            layers.append(_Layer(torch.stack(counts).sum(0), n, mean, torch.stack(sequences).mean(), of_z))
        return layers

    def _counted(self, router: Router, n: int) -> Tensor | None:
        """Which of the tokens of a forward pass count."""
        if self._mask is None:
            return None
        if self._mask.numel() != n:
            raise ValueError(
                f"Argument `mask` must give one value for each token, but it gives {list(self._mask.shape)} and the "
                f"router {router.name} saw {n} tokens."
            )
        return self._mask.reshape(-1).bool()

    def _sequences(self, router: Router, p: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
        if self.scope != "sequence":
            return p.new_zeros(())
        if self._mask is None or self._mask.dim() != 2:
            raise ValueError(
                "Argument `mask` must give [B, T] with the scope 'sequence', to know where sequences end."
            )
        return lb.sequence_loss(p, indices, len(self._mask), mask)

    def _kind(self, i: int, logits: Tensor) -> Scores:
        """How the router's logits become probabilities: not at all, where it puts out probabilities."""
        if i not in self._scores:  # once: the host waits for it
            rows = logits.detach().float()
            sure = (rows >= 0).all() & ((rows.sum(-1) - 1).abs() < 1e-2).all()
            self._scores[i] = "none" if bool(sure) else self.found[i].scores
        return self._scores[i]

    def _check_silence(self, pl_module: LightningModule) -> None:
        if self._scores:
            return  # a loss without the model
        why = (
            "It ran without gradients, as under reentrant activation checkpointing: use `use_reentrant=False`."
            if self._without_gradient
            else "Does `training_step` run them?"
        )
        raise RuntimeError(f"No router of {type(pl_module).__name__} fired before the first backward pass. {why}")

    # ------------------------------------------------------------------ the step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Correct the gradients of routers, and end the window."""
        if self._kept:
            self._correct(trainer, pl_module)
        self._kept = []
        if self.bias_rate and not self.window.closed:
            self._move_biases()
        self.window.closed = self.own.closed = True

    @torch.enable_grad()
    def _correct(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradient by the shares of the whole window, less that by the shares there were."""
        length = trainer.accumulate_grad_batches if pl_module.automatic_optimization else self.accumulate
        assert self.window.counts is not None
        f, tokens = self.window.shares(), self.window.counts[:, -1].clamp(min=1)
        strength = self._strength(length) * trainer.world_size * self.window.size
        lost: dict[int, Tensor] = {}
        for kept in self._kept:
            assert kept.pull is not None
            router, experts = self.found[kept.router], len(kept.pull)
            exact = strength * experts / tokens[kept.router] * f[kept.router, :experts]
            weight = next(router.module.parameters())
            args, named = tree_map_only(Tensor, partial(_alike, weight), kept.inputs)
            with torch.autocast(weight.device.type, enabled=False):
                logits, _ = router.read(router.module(*args, **named))
            p = lb.probabilities(logits, self._scores[kept.router])
            p = p if kept.mask is None else p * kept.mask[:, None]
            lost[kept.router] = lost.get(kept.router, 0) + (p * (exact - kept.pull)).sum()
        parameters = [p for i in lost for p in self.found[i].module.parameters() if p.requires_grad]
        found = torch.autograd.grad(list(lost.values()), parameters, [torch.ones_like(v) for v in lost.values()])
        whole = trainer.strategy.reduce(torch.cat([g.float().flatten() for g in found]), reduce_op="mean")
        for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
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
    def _note(self, layers: list[_Layer], losses: list[Tensor]) -> None:
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
        self._open = False
        for name, value in self._logged.items():
            pl_module.log(f"experts/{name}", value, on_step=True, on_epoch=False, batch_size=1)
        self._logged = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no longer."""
        BatchSeam.detach(trainer, self)
        self._trainer = self._ahead = None
        for undo in self._undo:
            undo()
        self._undo, self._heard, self._kept, self._open = [], [], [], False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As :meth:`teardown`, which Lightning does not call then."""
        self.teardown(trainer, pl_module, "")

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The counts of the window, so that a run may be resumed in the middle of one."""
        return {"window": self.window.state_dict(), "own": self.own.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them, in a fit."""
        self._state = dict(state_dict)


def _counts(layers: list[_Layer]) -> Tensor:
    """Choices of each expert, and tokens last: int64 ``[L, E + 1]``, 0 where a layer has fewer experts."""
    width = max(len(layer.counts) for layer in layers)
    rows = [nn.functional.pad(layer.counts, (0, width - len(layer.counts))) for layer in layers]
    return torch.cat([torch.stack(rows), torch.stack([layer.tokens for layer in layers])[:, None]], 1)


def _alike(weight: Tensor, x: Tensor) -> Tensor:
    """Of the weight's dtype, if it is floating."""
    return x.to(weight.dtype) if x.is_floating_point() else x
