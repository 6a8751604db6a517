"""Hard-sample selection and the rules it is compared with, on the seam."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from curation.callbacks.online.choice import Choice
from curation.callbacks.online.head_route import HeadRoute
from curation.callbacks.online.online_selection import OnlineSelection, is_number
from curation.callbacks.online.row_weights import RowWeights
from curation.online.hard_samples import (
    cdf_power,
    pareto_sample,
    priority_sample,
    rank_log_weights,
    successive_sample,
    variance_reduction,
)
from curation.online.top import top_rows
from curation.scoring import find_logits_maker, per_sample_from_hidden, per_sample_grad_norm, per_sample_loss

POOL = 1024


class HardSampleSelection(OnlineSelection):
    """Keeps the samples that the model finds hard.

    The rules, from the greediest to the unbiased one:

    - ``"top"`` keeps the highest scores (arXiv 2304.03486 for single samples);
    - ``"rank"`` draws with odds that fall exponentially with the rank; the selection pressure falls from ``pressure``
      to 1 over the fit (arXiv 1511.06343);
    - ``"cdf"`` is Selective-Backprop: draws with probability ``P(loss <= own)^beta`` among the last 1024 scores and
      the candidates (arXiv 1910.00762), told to keep exactly k;
    - ``"importance"`` draws in proportion to the score and weighs the kept rows, so that the expected gradient is
      that of the whole candidate batch (arXiv 1803.00942, by priority sampling), for losses that are means over rows,
      or over the scored positions of sequences. It wants ``score="grad_norm"``. A module with another loss takes the
      weights from an attribute ``sample_weights``.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1].
        rule: ``"top"``, ``"rank"``, ``"cdf"`` or ``"importance"``.
        score: ``"loss"``; ``"grad_norm"``, of the loss with respect to the logits, an upper bound of the whole; or
            ``"reducible_loss"``, the loss minus the sample's irreducible one (arXiv 2206.07137), which leaves out
            what is noisy or learnt already.
        irreducible: File with the irreducible losses, fp32 ``[N]`` by sample id, as ``curation irreducible`` writes.
        pressure: Of ``"rank"`` at the start: how many times as probable the hardest sample is as the easiest.
        beta: Of ``"cdf"``; None for ``1 / keep - 1``, which makes the mean probability ``keep``.
        when: ``"pays"`` trains on every candidate wherever that is measured to be faster.
        seed: Of the draws.
        trim: Drop the padding columns that no kept row uses.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the module gives no per-sample outputs, or weights cannot reach its loss; the message names what
            to add.
    """

    def __init__(
        self,
        keep: float,
        rule: Literal["top", "rank", "cdf", "importance"] = "top",
        score: Literal["loss", "grad_norm", "reducible_loss"] = "loss",
        irreducible: str | None = None,
        pressure: float = 100.0,
        beta: float | None = None,
        when: Literal["always", "pays"] = "always",
        seed: int = 0,
        trim: bool = True,
    ) -> None:
        if rule not in ("top", "rank", "cdf", "importance"):
            raise ValueError(f"Argument `rule` must be 'top', 'rank', 'cdf' or 'importance', but got {rule!r}.")
        if score not in ("loss", "grad_norm", "reducible_loss"):
            raise ValueError(f"Argument `score` must be 'loss', 'grad_norm' or 'reducible_loss', but got {score!r}.")
        if (score == "reducible_loss") != (irreducible is not None):
            raise ValueError(
                f"Argument `irreducible` must be a file with `score='reducible_loss'` and None without, but got "
                f"{irreducible!r} with `score={score!r}`."
            )
        if rule == "importance" and score == "reducible_loss":
            raise ValueError(
                "Argument `score` must not be negative with `rule='importance'`, but got 'reducible_loss'."
            )
        if not (is_number(pressure) and 1 <= pressure <= 1e12):
            raise ValueError(f"Argument `pressure` must be in [1, 1e12], but got {pressure!r}.")
        if beta is not None and not (is_number(beta) and 0 <= beta <= 1e6):
            raise ValueError(f"Argument `beta` must be in [0, 1e6] or None, but got {beta!r}.")
        self.rule = rule
        self.score_name = score
        self.irreducible = irreducible
        self.pressure = float(pressure)
        self.beta = beta
        super().__init__(keep=keep, when=when, seed=seed, trim=trim)

    def _reset(self) -> None:
        super()._reset()
        self.pool = torch.full((0,), torch.nan)
        self._losses: Tensor | None = None
        self._irreducible: Tensor | None = None
        self._weights: RowWeights | None = None
        self._route_of_head = HeadRoute("auto")
        self._steps = float("inf")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the seam; read the irreducible losses."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.irreducible is not None:
            self._irreducible = read_irreducible(self.irreducible)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long the fit is, over which the selection pressure falls."""
        super().on_train_start(trainer, pl_module)
        if self.rule == "rank":
            self._steps = float(trainer.estimated_stepping_batches)
            if self._steps == float("inf"):
                rank_zero_warn("The length of the fit is unknown, so the selection pressure stays where it starts.")
        if self._irreducible is not None:
            size = len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
            if len(self._irreducible) < size:
                raise ValueError(
                    f"Argument `irreducible` must name a file with one loss for each of the {size} training samples, "
                    f"but {self.irreducible!r} has {len(self._irreducible)}."
                )

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """The loss of every candidate, or the norm of its gradient: fp32 ``[B]``."""
        head = self._route_of_head.find(self, trainer, pl_module, batch)
        outputs, targets = self.outputs(trainer, pl_module, batch, head)
        if self.rule == "importance" and self._weights is None:
            self._weights = RowWeights(pl_module, find_logits_maker(pl_module, batch))
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            losses = self._value(outputs, targets, head)
            if self._irreducible is None:
                return losses
            if sample_ids is None:
                raise TypeError(
                    "`score='reducible_loss'` needs sample ids: wrap the training data set in "
                    "`curation.sample_ids.SampleIds`."
                )
            self._irreducible = self._irreducible.to(losses.device)
            return losses - self._irreducible[sample_ids]

    def _value(self, outputs: Tensor, targets: Tensor, head: nn.Linear | None) -> Tensor:
        value = per_sample_grad_norm if self.score_name == "grad_norm" else per_sample_loss
        return value(outputs, targets) if head is None else per_sample_from_hidden(value, outputs, targets, head)

    def describe(self) -> str:
        """The rule, and the route of the scores."""
        how = "at scored positions only" if self._route_of_head.used else "from logits"
        return f"{self.rule} {self.score_name}, {super().describe()}, {how}{self._route_of_head.why}"

    def choose(self, trainer: Trainer, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """Draw rows by the rule."""
        self._losses = scores
        if self.rule == "top":
            return top_rows(scores, k), None
        draw = np.random.default_rng((self.seed, self.batches, trainer.global_rank)).random(len(scores))
        uniform = torch.from_numpy(draw).to(scores.device, non_blocking=True)
        if self.rule == "rank":
            done = trainer.fit_loop.epoch_loop._batches_that_stepped / self._steps
            log_weights = rank_log_weights(scores, self.pressure ** max(0.0, 1 - done))
            return successive_sample(log_weights, k, uniform), None
        if self.rule == "cdf":
            pool = torch.cat([self.pool.to(scores), scores])
            beta = min(1 / self.keep - 1, 1e6) if self.beta is None else self.beta
            return pareto_sample(cdf_power(scores, pool, beta), k, uniform), None
        # The loss of sequences is a mean over positions, to which a longer one adds more.
        lengths = torch.ones_like(scores) if self._lengths is None else self._lengths
        rows, weights = priority_sample(scores * lengths, k, uniform)
        weights = weights * (lengths[rows].mean() / lengths.mean())
        assert self._weights is not None
        if not self._probing:
            self._weights.set(weights)
        return rows, weights

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise, before the optimizer's step, if the weights do not reach the loss."""
        if self._weights is not None:
            self._weights.check()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """As in the base; the weights are those of one step only."""
        if self._weights is not None:
            self._weights.check()  # a manual optimisation may call no hook
            self._weights.set(None)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_kept(self, trainer: Trainer, rows: Tensor, k: int) -> None:
        """Remember the scores of every rank's candidates, in rank order."""
        if self.rule != "cdf":
            return
        assert self._losses is not None
        assert self.candidates is not None
        scores = self._losses.new_full((self.candidates,), torch.nan)  # ranks may have had fewer rows
        seen = self._losses[: self.candidates]
        scores[: len(seen)] = seen
        if trainer.world_size > 1:
            scores = trainer.strategy.all_gather(scores).flatten()
        self.pool = torch.cat([self.pool.to(scores), scores])[-POOL:]

    def _statistics(self, choice: Choice) -> dict[str, Tensor | float]:
        stats = super()._statistics(choice)
        if self.rule == "importance" and choice.scores is not None:
            lengths = 1 if choice.lengths is None else choice.lengths
            stats["variance_reduction"] = variance_reduction(choice.scores * lengths)
        return stats

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam and the weights."""
        super().teardown(trainer, pl_module, stage)
        self._route_of_head.forget()
        if self._weights is not None:
            self._weights.remove()
            self._weights = None

    def state_dict(self) -> dict[str, Any]:
        """Counters and the scores compared with, the same on every rank."""
        return {
            **super().state_dict(),
            "score": self.score_name,
            "pool": self.pool,
            "by_head": self._route_of_head.used,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().restore(state)
        if state["score"] == self.score_name:  # scores of another kind cannot be compared
            self.pool = state["pool"]
        self._route_of_head.used = state["by_head"]


def read_irreducible(file: str) -> Tensor:
    """The table that ``curation irreducible`` wrote: fp32 ``[N]``.

    Raises:
        ValueError: If the file is missing, or holds something else.
    """
    if not Path(file).is_file():
        raise ValueError(f"Argument `irreducible` must name a file, but there is no {file!r}.")
    try:
        table = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"Argument `irreducible` must name a file with one loss per sample, but {file!r}: {error}"
        ) from error
    if not (isinstance(table, Tensor) and table.is_floating_point() and table.dim() == 1):
        raise ValueError(f"Argument `irreducible` must name a file with one loss per sample, but {file!r} has not.")
    return table.float()
