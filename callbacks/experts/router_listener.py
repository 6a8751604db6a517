"""What routers do in a step, heard through hooks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curation.experts import load_balancing as lb
from curation.experts.routers import Router, Scores

HEARD = "_curation_heard"  # of a router, while it is listened to


@dataclass
class Heard:
    """A forward pass of a router.

    Attributes:
        router: Its number.
        inputs: What went in, by position and by name, if that is kept.
        output: What came out.
        mask: Which tokens count, bool ``[N]``; None for all.
        pull: By how much each expert's probability of a token is in the loss, fp32 ``[E]``.
    """

    router: int
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
    output: Any
    mask: Tensor | None = None
    pull: Tensor | None = None


@dataclass
class Layer:
    """What a router did in a micro-batch, in all its forward passes.

    Attributes:
        counts: int64 ``[E]``.
        tokens: int64 scalar: those that count.
        mean: fp32 ``[E]``, of the probabilities of these, with gradient.
        sequences: Scalar: the loss of its sequences, where that is asked for.
        z: Scalar: the z-loss, where that is.
    """

    counts: Tensor
    tokens: Tensor
    mean: Tensor
    sequences: Tensor
    z: Tensor


class RouterListener:
    """Keeps the forward passes of routers that will be differentiated.

    Args:
        routers: To listen to.
        inputs: Whether what goes in is kept.
        sequences: Whether the loss of sequences is asked for.
        z: Whether the z-loss is.

    Attributes:
        scores: How the logits of each router become probabilities, as far as it has fired.
        mask: Which tokens of the present batch count, ``[B, T]`` or flat; None for all.
        open: Whether this is a step of training.
        backward: Whether it is being differentiated: activation checkpointing runs routers again then.
        trying: Whether passes without gradients are kept, too.
    """

    def __init__(self, routers: list[Router], inputs: bool, sequences: bool, z: bool) -> None:
        self.routers = routers
        self.inputs = inputs
        self.sequences = sequences
        self.z = z
        self.scores: dict[int, Scores] = {}
        self.mask: Tensor | None = None
        self.open = self.backward = self.trying = False
        self._fired = False  # with gradients, ever
        self._silent: list[bool] = []  # of each backward pass of the step, whether nothing was heard before it
        self._without = False  # gradients, in this step
        self._undo = [router.module.register_forward_hook(self._hear, with_kwargs=True).remove for router in routers]
        for router in routers:
            setattr(router.module, HEARD, [])

    def _hear(self, module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        # One function for all, and a list on the module: torch.compile makes one graph of layers that are alike.
        if self.open and not self.backward:
            differentiated = torch.is_grad_enabled() or self.trying
            kept = (inputs, named) if self.inputs and differentiated else None
            getattr(module, HEARD).append((kept, output if differentiated else None))

    def begin(self, training: bool) -> None:
        """Forget what was heard, and listen if this is a step of training."""
        self._collect()
        self._silent, self._without = [], False
        self.open, self.backward = training, False

    def _collect(self) -> list[Heard]:
        heard = []
        for i, router in enumerate(self.routers):
            kept = getattr(router.module, HEARD)
            heard += [Heard(i, inputs, output) for inputs, output in kept]
            kept.clear()
        return heard

    def take(self) -> list[Heard]:
        """What was heard since the last time, with gradients.

        Raises:
            RuntimeError: If routers ran without gradients alone, and never ran with any.
        """
        every = self._collect()
        heard = [one for one in every if one.output is not None]
        if not self.trying:
            self._silent.append(not heard)
            self._fired |= bool(heard)
            self._without |= len(every) > len(heard)
            if self._without and not self._fired:
                raise RuntimeError(
                    "No router fired with gradients before the first backward pass, but without: as under reentrant "
                    "activation checkpointing; use `use_reentrant=False`."
                )
        return heard

    def end(self, pl_module: nn.Module) -> None:
        """Listen no longer, until the next step.

        Raises:
            RuntimeError: If routers did not fire in a step that was differentiated, or the loss passed by.
        """
        self.open = False
        left = self._collect()
        if self._silent and all(self._silent) and (self._without or not self._fired):
            why = "Is its activation checkpointing reentrant?" if self._without else "Does `training_step` run them?"
            raise RuntimeError(f"No router of {type(pl_module).__name__} fired with gradients in this step. {why}")
        by_hand = not getattr(pl_module, "automatic_optimization", True)
        if by_hand and not self._silent and any(one.output is not None for one in left):
            raise RuntimeError(
                f"{type(pl_module).__name__} differentiates a loss that GlobalBatchLoadBalancing does not see: call "
                "`self.manual_backward(loss)` and not `loss.backward()`."
            )

    def layers(self, heard: list[Heard]) -> list[Layer]:
        """What was heard, by router; enters the masks there.

        Raises:
            RuntimeError: If a router is missing.
            ValueError: If the mask does not fit.
        """
        layers = []
        for i, router in enumerate(self.routers):
            passes = [one for one in heard if one.router == i]
            if not passes:
                raise RuntimeError(
                    f"The router {router.name} did not fire with gradients where others did. If it is not meant to, "
                    "leave it out of `routers`; under reentrant activation checkpointing use `use_reentrant=False`."
                )
            counts, tokens, total, sequences, z = [], [], [], [], []
            for one in passes:
                logits, indices = router.read(one.output)
                mask = one.mask = self._counted(router, len(logits))
                kind = self._kind(i, logits, mask)
                if mask is not None:  # padding may be NaN, which 0 times it is too
                    logits = logits.masked_fill(~mask[:, None], 0)
                p = lb.probabilities(logits, kind)
                n = mask.sum() if mask is not None else torch.full((), len(p), device=p.device)
                counts.append(lb.expert_counts(indices, p.size(1), mask))
                tokens.append(n)
                total.append(p.sum(0) if mask is None else (p * mask[:, None]).sum(0))
                sequences.append(self._of_sequences(p, indices, mask))
                z.append(n * lb.z_loss(logits, mask) if self.z else p.new_zeros(()))
            n = torch.stack(tokens).sum()
            mean, of_z = torch.stack(total).sum(0) / n.clamp(min=1), torch.stack(z).sum() / n.clamp(min=1)
            layers.append(Layer(torch.stack(counts).sum(0), n, mean, torch.stack(sequences).mean(), of_z))
        return layers

    def _counted(self, router: Router, n: int) -> Tensor | None:
        if self.mask is None:
            return None
        if self.mask.numel() != n:
            raise ValueError(
                f"Argument `mask` must give one value for each token, but it gives {list(self.mask.shape)} and the "
                f"router {router.name} saw {n} tokens."
            )
        return self.mask.reshape(-1).bool()

    def _of_sequences(self, p: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
        if not self.sequences:
            return p.new_zeros(())
        if self.mask is None or self.mask.dim() != 2:
            raise ValueError(
                "Argument `mask` must give [B, T] with the scope 'sequence', to know where sequences end."
            )
        return lb.sequence_loss(p, indices, len(self.mask), mask)

    def _kind(self, i: int, logits: Tensor, mask: Tensor | None) -> Scores:
        """How the router's logits become probabilities: not at all, where it puts out probabilities."""
        if i not in self.scores:  # once: the host waits for it
            rows = logits.detach().float()
            rows = rows if mask is None or not mask.any() else rows[mask]
            sure = (rows >= 0).all() & ((rows.sum(-1) - 1).abs() < 1e-2).all()
            self.scores[i] = "none" if bool(sure) else self.routers[i].scores
        return self.scores[i]

    def remove(self) -> None:
        """Leave the routers as they were."""
        for undo in self._undo:
            undo()
        for router in self.routers:
            vars(router.module).pop(HEARD, None)
        self._undo, self.routers = [], []


def stacked(layers: list[Layer]) -> Tensor:
    """Choices of each expert, and tokens last: int64 ``[L, E + 1]``, 0 where a layer has fewer experts."""
    width = max(len(layer.counts) for layer in layers)
    rows = [nn.functional.pad(layer.counts, (0, width - len(layer.counts))) for layer in layers]
    return torch.cat([torch.stack(rows), torch.stack([layer.tokens for layer in layers])[:, None]], 1)
