"""A load-balancing loss over all tokens of an optimizer step, for any mixture of experts."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from curation.callbacks.experts.estimators import GLOBAL, SCOPES, MicroBatch, make_estimator
from curation.callbacks.experts.router_listener import Phase, RouterCall, RouterListener, refuse_balancing_losses
from curation.callbacks.lightning.collectives import sum_over_processes
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loop import skips_backward
from curation.callbacks.lightning.seam import refuse_strategies
from curation.checks import check_choice, check_integer, check_number, check_text
from curation.experts.load_balancing import bias_update, expert_fractions, load_balancing_loss
from curation.experts.router_scores import CANDIDATES
from curation.experts.router_statistics import balance_metrics, stack_counts
from curation.experts.routers import Router, adds_balancing_loss, find_routers, selection_bias
from curation.experts.window import Window


class GlobalBatchLoadBalancing(FitCallback):
    r"""Adds a load-balancing loss whose fractions are taken over all tokens between two steps of the optimizer.

    The loss of each router, with the fractions ``f_i`` over the micro-batches of all processes and the mean
    probabilities ``P_i`` over the tokens at hand, is

    .. math:: E \sum_{i=1}^{E} f_i P_i

    It is added to the loss of every micro-batch, with weights that make the gradients add up to those of one large
    batch (arXiv 2501.11873). Only counts are synchronised: those of all layers in one collective per micro-batch.
    Evaluation is unchanged, and so is the loss that the module returns and logs.

    Logs ``experts/loss``, the mean over layers; ``experts/max_load``, ``E max f`` of the worst layer;
    ``experts/dead``, the fraction of experts that were not chosen; and ``experts/excess_loss``, how far the loss
    exceeds 1, which can be 0 without balance (read ``max_load``). The fractions are those of all processes and of the
    micro-batches since the last step.

    A module that optimizes by hand, and makes several backward passes of a batch, may say so before each of them by
    two attributes: ``passes_per_step``, the number of passes between two steps of the optimizer, in place of
    ``accumulate``; and ``token_mask`` ``[B, T]``, the tokens of the pass that count, in place of ``mask``.

    Args:
        coefficient: Factor of the loss, which is summed over layers; in [0, inf).
        scope: Tokens over which each layer is balanced: ``"global"``, all tokens of an optimizer step; ``"rank"``,
            those of a process; ``"micro"``, those of a micro-batch, as is usual elsewhere; or ``"sequence"``, those
            of each sequence.
        estimator: How a micro-batch accounts for later micro-batches of the step. ``"running"``: not at all (the
            buffer of the paper); ``"warm"``: earlier windows stand for them; ``"deferred"``: as running, and the
            gradients of the routers are corrected exactly before the optimizer steps, for which the inputs of the
            routers are stored; ``"prepass"``: all micro-batches go through the model in evaluation mode first, which
            is exact for all weights where the choices of the routers do not depend on dropout.
        micro_fraction: Fraction of the loss that has the scope ``"micro"``, in [0, 1] (0.01 in the paper).
        z_coefficient: Factor of the z-loss (arXiv 2202.08906), in [0, inf).
        bias_rate: Size of the step of the bias that some routers add for choosing alone (arXiv 2408.15664, 0.001
            there), in [0, inf).
        routers: Names of the routers, see :func:`~curation.experts.routers.find_routers`.
        top_k: Number of experts per token, for all routers; None for the value that each router has.
        scores: How logits become probabilities; ``"auto"`` for what each router does.
        mask: Tokens that count: the key of a value ``[B, T]`` that is not 0 there, in batches that are mappings; or a
            function from the batch to that value; None for all tokens. The routers of a decoder that has an encoder
            take the key with ``decoder_`` before it, else the tokens whose ``labels`` are not -100, else all; a
            function returns a pair for such a model, of the encoder and the decoder.
        accumulate: Number of micro-batches of an optimizer step, where the module optimizes by hand.
        buffer: Old name of ``estimator``; None where that is used.

    Raises:
        ValueError: If an argument is of the wrong type or out of its range, there is no router, a router does not
            tell its scores or its experts, or the model adds such a loss itself.
        RuntimeError: If routers do not fire where they should.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> balancing = GlobalBatchLoadBalancing(0.01, estimator="deferred")
        >>> trainer = Trainer(accumulate_grad_batches=16, callbacks=[balancing], logger=False, barebones=True)
    """

    def __init__(
        self,
        coefficient: float = 0.008,
        scope: Literal["global", "rank", "micro", "sequence"] = "global",
        estimator: Literal["running", "warm", "deferred", "prepass"] = "running",
        micro_fraction: float = 0.0,
        z_coefficient: float = 0.0,
        bias_rate: float = 0.0,
        routers: str | Callable[[str, nn.Module], bool] = "auto",
        top_k: int | None = None,
        scores: Literal["auto", "softmax", "sigmoid", "sqrtsoftplus"] = "auto",
        mask: str | Callable[[Any], Tensor] | None = "attention_mask",
        accumulate: int = 1,
        buffer: Literal["running", "warm", "deferred", "prepass"] | None = None,
    ) -> None:
        if buffer is not None:
            check_choice("buffer", buffer, ("running", "warm", "deferred", "prepass"))
            if estimator not in ("running", buffer):
                raise ValueError(
                    f"Argument `buffer` must be None beside `estimator`, its new name, but got {buffer!r} and "
                    f"{estimator!r}."
                )
            estimator = buffer
        self.coefficient = check_number("coefficient", coefficient, "[0, inf)")
        self.scope = check_choice("scope", scope, SCOPES)
        self.estimator = check_choice("estimator", estimator, tuple(GLOBAL))
        self.micro_fraction = check_number("micro_fraction", micro_fraction, "[0, 1]")
        self.z_coefficient = check_number("z_coefficient", z_coefficient, "[0, inf)")
        self.bias_rate = check_number("bias_rate", bias_rate, "[0, inf)")
        self.routers = routers if callable(routers) else check_text("routers", routers)
        self.top_k = check_integer("top_k", top_k, 1, optional=True)
        check_choice("scores", scores, ("auto", *CANDIDATES))
        self.scores = scores
        self.mask = mask if callable(mask) else check_text("mask", mask, optional=True)
        self.accumulate = check_integer("accumulate", accumulate, 1)
        self._routers: list[Router] = []
        self._listener: RouterListener | None = None
        self._undo: list[Callable[[], None]] = []
        self._reset()

    def _reset(self) -> None:
        self._estimator = make_estimator(self.scope, self.estimator)
        self._restored: dict[str, Any] | None = None
        self._masks: list[Tensor | None] = []  # of the current batch, for each router
        self._remaining = 0.0  # micro-batches of the epoch after the current one
        self._router_optimizers: list[Any] = []
        self._metrics: dict[str, Tensor] = {}

    @property
    def window(self) -> Window:
        """The counts of all processes since the last step of the optimizer."""
        return self._estimator.window

    # ------------------------------------------------------------------ the routers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            refuse_strategies(trainer, self)
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, and listen to them."""
        self._routers = find_routers(pl_module, self.routers, self.top_k, self.scores)
        for module in pl_module.modules():
            if adds_balancing_loss(getattr(module, "config", None)):
                raise ValueError(
                    f"{type(module).__name__} adds a load-balancing loss itself: set `config.output_router_logits` "
                    "to False, or leave GlobalBatchLoadBalancing out."
                )
        self._undo = refuse_balancing_losses(pl_module)
        if self.bias_rate and all(selection_bias(router) is None for router in self._routers):
            raise ValueError(
                f"Argument `bias_rate` must be 0 where no router has a bias, but got {self.bias_rate!r}."
            )
        self._estimator.start(trainer, pl_module)
        self._listener = RouterListener(self._routers, self._estimator.stores_inputs)
        rank_zero_info(
            f"GlobalBatchLoadBalancing: {len(self._routers)} routers, {self._routers[0].name} to "
            f"{self._routers[-1].name}."
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which optimizers end a window, and take over the state of a checkpoint."""
        # Whether or not it is their turn: `toggle_optimizer` freezes the weights of the others.
        weights = {id(p) for router in self._routers for p in router.module.parameters()}
        self._router_optimizers = [
            optimizer
            for optimizer in trainer.optimizers
            if any(id(p) in weights for group in optimizer.param_groups for p in group["params"])
        ]
        for router in self._routers if self.bias_rate else []:
            bias = selection_bias(router)
            if bias is not None and (bias.dtype != torch.float32 or isinstance(bias, DTensor) or not bias.numel()):
                raise ValueError(
                    "Argument `bias_rate` must be 0 where a bias is not a whole fp32 tensor, but that of "
                    f"{router.name} is {bias.dtype}, {type(bias).__name__}."
                )
        if self._restored is not None:
            self._estimator.load_state_dict(self._restored, trainer.strategy.root_device)
            self._restored = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the calls of the routers, and note which tokens count."""
        listener = self._listening()
        listener.begin_step(trained=not skips_backward(trainer))
        self._remaining = trainer.num_training_batches - batch_idx - 1
        if listener.phase is Phase.FORWARD:
            _, expected = self._length(trainer, pl_module)
            with listener.in_phase(Phase.COUNTING):
                self._estimator.look_ahead(trainer, batch, batch_idx, expected, self._count)
        self._masks = self._masks_of(batch)

    def _listening(self) -> RouterListener:
        assert self._listener is not None
        return self._listener

    def _masks_of(self, batch: Any) -> list[Tensor | None]:
        """The tokens that count, for each router."""
        has_decoder = any(router.decoder for router in self._routers)
        if callable(self.mask):
            masks = self.mask(batch)
            if has_decoder != isinstance(masks, tuple):
                raise ValueError(
                    "Argument `mask` must return a pair, of the encoder and the decoder, for a model that has both, "
                    f"and one mask for any other, but it returned {type(masks).__name__}."
                )
            encoder, decoder = masks if has_decoder else (masks, None)
        else:
            values = batch if isinstance(batch, Mapping) and self.mask is not None else {}
            encoder = values[self.mask] != 0 if self.mask in values else None
            decoder = values["labels"] != -100 if has_decoder and "labels" in values else None
            if f"decoder_{self.mask}" in values:
                decoder = values[f"decoder_{self.mask}"] != 0
        return [decoder if router.decoder else encoder for router in self._routers]

    def _length(self, trainer: Trainer, pl_module: LightningModule) -> tuple[int, int]:
        """Micro-batches by which a step is divided, and those that the current window will have."""
        if pl_module.automatic_optimization:
            length = trainer.accumulate_grad_batches
        elif "passes_per_step" in vars(pl_module):
            passes = vars(pl_module)["passes_per_step"]
            return passes, passes
        else:
            length = self.accumulate
        return length, self.window.expected_size(length, self._remaining)

    def _count(self, batch: Any) -> Tensor:
        """Choices of the routers for a batch that was tried: int64 ``[L, E + 1]``."""
        listener = self._listening()
        return stack_counts(listener.statistics(listener.take_counted(), self._masks_of(batch)))

    # ------------------------------------------------------------------ the loss

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the loss of the routers' calls since the last backward pass."""
        calls = self._listening().begin_backward()
        if calls:  # none if the loss does not come from the model
            with torch.autocast(loss.device.type, enabled=False):
                added = self._balancing_loss(trainer, pl_module, calls)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            added = (added if scaler is None else scaler.scale(added)).to(loss.dtype)
            # In place, since this very tensor is differentiated next. Its value stays, and so does what was saved.
            with torch.autograd._unsafe_preserve_version_counter(loss):
                loss.add_(added - added.detach())

    def _balancing_loss(self, trainer: Trainer, pl_module: LightningModule, calls: list[RouterCall]) -> Tensor:
        token_mask = None if pl_module.automatic_optimization else getattr(pl_module, "token_mask", None)
        masks = self._masks if token_mask is None else [token_mask.to(pl_module.device)] * len(self._routers)
        statistics = self._listening().statistics(
            calls, masks, self._estimator.uses_sequences, self.z_coefficient > 0
        )
        counts = stack_counts(statistics)
        total = sum_over_processes(trainer, counts.clone())
        length, expected = self._length(trainer, pl_module)
        batch = MicroBatch(calls, statistics, counts, total, masks, expected, trainer.world_size)
        losses, weights = self._estimator.losses(batch)
        added = torch.zeros((), device=counts.device)
        for each, loss, weight in zip(statistics, losses, weights, strict=True):
            micro = load_balancing_loss(expert_fractions(each.counts), each.probabilities)
            mixed = (1 - self.micro_fraction) * weight * loss + self.micro_fraction * micro
            added = added + self.coefficient * mixed + self.z_coefficient * each.z_loss
        self._metrics = {
            "loss": torch.stack(losses).detach().mean(),
            **balance_metrics(self.window.fractions(), statistics),
        }
        return added / length

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the calls of the routers again."""
        self._listening().end_backward()

    # ------------------------------------------------------------------ the step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Correct the gradients of routers, and end the window, if this is an optimizer of routers."""
        if self._router_optimizers and not any(optimizer is each for each in self._router_optimizers):
            return
        length, _ = self._length(trainer, pl_module)
        strength = self.coefficient * (1 - self.micro_fraction) / length
        with self._listening().in_phase(Phase.BACKWARD):  # routers may run again
            self._estimator.before_optimizer_step(trainer, optimizer, self._routers, strength)
        if self.bias_rate and not self.window.closed:
            self._move_biases()
        self._estimator.close_window()

    def _move_biases(self) -> None:
        assert self.window.counts is not None
        for router, counts in zip(self._routers, self.window.counts[:, :-1], strict=True):
            bias = selection_bias(router)
            if bias is not None:
                bias.data.add_(bias_update(counts[: len(bias)], self.bias_rate))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the loss and the loads."""
        self._listening().end_step(pl_module)
        for name, value in self._metrics.items():
            pl_module.log(f"experts/{name}", value, on_step=True, on_epoch=False, batch_size=1)
        self._metrics = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the routers and the data loader as they were."""
        self._estimator.teardown(trainer, pl_module, stage)
        if self._listener is not None:
            self._listener.remove()
        for undo in self._undo:
            undo()
        self._listener, self._routers, self._router_optimizers, self._masks, self._undo = None, [], [], [], []

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The counts of the window, so that a run may be resumed in the middle of one."""
        return self._estimator.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the counts when training starts."""
        self._restored = dict(state)
