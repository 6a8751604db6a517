"""Hard-sample selection and the rules it is compared with, as a callback."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from curation.callbacks.lightning.collectives import gather_rows
from curation.callbacks.lightning.loop import curated_loader, logging_step
from curation.callbacks.online.choice import Choice
from curation.callbacks.online.head_route import HeadRoute
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.online.row_weights import RowWeights, WeighsRows
from curation.checks import check_choice, check_number, check_text
from curation.online.hard_samples import (
    cdf_power,
    floored_log_weights,
    low_score_sample,
    pareto_sample,
    priority_sample,
    rank_log_weights,
    successive_sample,
    variance_reduction,
)
from curation.online.top import top_rows
from curation.scoring import (
    find_logits_maker,
    hugging_face_models,
    per_sample_from_hidden,
    per_sample_grad_norm,
    per_sample_loss,
)

POOL = 1024
RULES = ("top", "rank", "proportional", "selective_backprop", "importance", "drop_high")
OLD_NAMES = {"cdf": "selective_backprop"}


class HardSampleSelection(WeighsRows, OnlineSelection):
    """Keeps the samples that are hard for the model.

    The rules, from the greediest to the unbiased one:

    - ``"top"`` keeps the highest scores (arXiv 2304.03486 for single samples);
    - ``"rank"`` draws with odds that fall exponentially with the rank; the selection pressure falls from ``pressure``
      to 1 over the fit (arXiv 1511.06343);
    - ``"proportional"`` draws with odds in proportion to the score, at least a tenth of the mean, without weights;
    - ``"selective_backprop"`` draws exactly k rows, each with probability ``P(s <= s_i)^beta``, the fraction
      of the last 1024 scores and the candidates that is not above its score ``s_i`` (arXiv 1910.00762);
    - ``"importance"`` draws in proportion to the score and weighs the kept rows, so that the expected gradient is
      that of the whole candidate batch (arXiv 1803.00942, by priority sampling), for losses that are means over rows,
      or over the scored positions of sequences. Use it with ``score="grad_norm"``. A module with another loss takes
      the weights from an attribute ``sample_weights`` and multiplies its per-sample losses by them: for a mean over
      rows, or for a mean over scored positions where the batch is that of a Hugging Face model.

    And one for wrong labels: ``"drop_high"`` leaves out the share ``drop`` of each batch with the highest scores, and
    draws from the others at random (samples of small loss, arXiv 1804.06872).

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1].
        rule: ``"top"``, ``"rank"``, ``"proportional"``, ``"selective_backprop"``, ``"importance"`` or
            ``"drop_high"``; ``"cdf"`` is an old name of the fourth.
        score: ``"loss"``; ``"grad_norm"``, the norm of the loss's gradient with respect to the logits, which bounds
            the norm of the whole gradient up to a constant; or ``"reducible_loss"``, the loss minus the sample's
            irreducible loss (arXiv 2206.07137), which leaves out samples that are noisy or learnt already.
        irreducible: File with the irreducible losses, fp32 ``[N]`` by sample id, as ``curation irreducible`` writes.
        pressure: How many times as probable the hardest sample is as the easiest at the start of the fit, in
            [1, 1e12]; used by ``"rank"``.
        beta: Exponent of the probabilities, in [0, 1e6], used by ``"selective_backprop"``; None for ``1 / keep - 1``,
            which makes the mean probability ``keep``.
        when: ``"pays"`` trains on every candidate wherever that is measured to be faster.
        seed: Seed of the random draws, in [0, 2^63); equal on all ranks.
        trim: Drop the padding columns that no kept row uses.
        drop: Share of each candidate batch that ``"drop_high"`` leaves out, in [0, 1).
        candidate_batches: Batches of the data loader that make one candidate batch; ``keep`` is then 1 over it, or
            None.
        precision: Precision of the scoring pass: ``"fit"`` for that of the fit, ``"bf16"`` for autocast to bf16,
            which ranks language models' losses alike in about a third of the time on a CPU with bf16 instructions.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the module gives no per-sample outputs, or weights cannot reach its loss; the message names what
            to add.

    Example:
        >>> selection = HardSampleSelection(keep=0.5, rule="top")
        >>> losses = torch.tensor([0.1, 2.0, 0.7, 0.3])
        >>> rows, weights = selection.choose(None, losses, 2)
        >>> rows
        tensor([1, 2])
    """

    guarded = False  # `outputs` is
    by_row = True

    def __init__(
        self,
        keep: float | None = None,
        rule: Literal["top", "rank", "proportional", "selective_backprop", "importance", "drop_high", "cdf"] = "top",
        score: Literal["loss", "grad_norm", "reducible_loss"] = "loss",
        irreducible: str | None = None,
        pressure: float = 100.0,
        beta: float | None = None,
        when: Literal["always", "pays"] = "always",
        seed: int = 0,
        trim: bool = True,
        drop: float = 0.3,
        candidate_batches: int = 1,
        precision: Literal["fit", "bf16"] = "fit",
    ) -> None:
        self.precision = check_choice("precision", precision, ("fit", "bf16"))
        self.rule = check_choice("rule", OLD_NAMES.get(str(rule), rule), RULES)
        self.score_name = check_choice("score", score, ("loss", "grad_norm", "reducible_loss"))
        self.irreducible = check_text("irreducible", irreducible, optional=True)
        self.pressure = check_number("pressure", pressure, "[1, 1e12]")
        self.beta = check_number("beta", beta, "[0, 1e6]", optional=True)
        self.drop = check_number("drop", drop, "[0, 1)")
        if (score == "reducible_loss") != (irreducible is not None):
            raise ValueError(
                f"Argument `irreducible` must be a file with `score='reducible_loss'` and None without, but got "
                f"{irreducible!r} with `score={score!r}`."
            )
        if rule == "importance" and score == "reducible_loss":
            raise ValueError(
                "Argument `score` must not be negative with `rule='importance'`, but got 'reducible_loss'."
            )
        super().__init__(keep, when, seed, trim, candidate_batches)
        if rule == "drop_high" and 1 - self.drop + 1e-9 < self.keep < 1:
            raise ValueError(
                f"Argument `drop` must be at most 1 - keep, or what is left out would be kept, but got {drop!r} with "
                f"keep={keep!r}."
            )

    @property
    def weighs(self) -> bool:  # noqa: D102 - as in the base
        return self.rule == "importance"

    def _reset(self) -> None:
        super()._reset()
        self.pool = torch.full((0,), torch.nan)
        self.head_route = HeadRoute("auto")
        self.row_weights = None
        self._mean_over_positions: bool | None = None
        self._unsized = False
        self._irreducible: Tensor | None = None
        self._steps = float("inf")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the seam; read the irreducible losses."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.irreducible is not None:
            self._irreducible = read_irreducible(self.irreducible)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the length of the fit, over which the selection pressure falls; check the irreducible losses."""
        super().on_train_start(trainer, pl_module)
        if self.rule == "rank":
            self._steps = float(trainer.estimated_stepping_batches)
            if self._steps == float("inf"):
                rank_zero_warn("The length of the fit is unknown, so the selection pressure stays where it starts.")
        if self._irreducible is not None:
            dataset = curated_loader(trainer).dataset
            self._unsized = not hasattr(dataset, "__len__")  # a stream, whose ids are checked as they come
            size = 0 if self._unsized else len(dataset)
            if len(self._irreducible) < size:
                raise ValueError(
                    f"Argument `irreducible` must name a file with one loss for each of the {size} training samples, "
                    f"but {self.irreducible!r} has {len(self._irreducible)}."
                )

    def scorer(self, pl_module: LightningModule) -> LightningModule:
        """The module whose losses are the scores."""
        return pl_module

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """The loss of every candidate, its reducible part, or the norm of its gradient: fp32 ``[B]``."""
        scorer = self.scorer(pl_module)
        head = self.head_route.find(self, trainer, scorer, batch)
        outputs, targets = self.outputs(trainer, scorer, batch, head)
        if targets is None and self.score_name == "grad_norm":
            raise TypeError(
                f"`score='grad_norm'` needs logits, but of `{type(scorer).__name__}` there are losses only, from "
                f"{self.scoring_pass.name}. Use `score='loss'`, or let `score_step` return `(logits, targets)`."
            )
        if self.rule == "importance" and self.row_weights is None:
            over_positions = isinstance(batch, Mapping) and len(hugging_face_models(pl_module)) == 1
            if over_positions and targets is None and not hasattr(pl_module, "sample_losses"):
                raise TypeError(
                    f"`rule='importance'` needs the lengths of sequences, but `{type(scorer).__name__}.score_step` "
                    "returns losses. Let it return `(logits, targets)`, or let `training_step` leave the losses of "
                    "its rows in an attribute `sample_losses`."
                )
            self.row_weights = RowWeights(pl_module, find_logits_maker(pl_module, batch), over_positions)
            if self._mean_over_positions is not None:
                self.row_weights.positions = self._mean_over_positions
        with torch.no_grad(), self.in_precision(trainer, scorer):
            value = per_sample_grad_norm if self.score_name == "grad_norm" else per_sample_loss
            score = self.scoring_pass.criterion.bind(value)
            scores = (
                score(outputs, targets) if head is None else per_sample_from_hidden(score, outputs, targets, head)
            )
            if self._irreducible is None:
                return scores
            if sample_ids is None:
                raise TypeError(
                    "`score='reducible_loss'` needs sample ids: wrap the training data set in "
                    "`curation.sample_ids.SampleIds`, "
                    "and keep its key `sample_id` in a `collate_fn` of your own."
                )
            if (self._unsized or sample_ids.device.type == "cpu") and int(sample_ids.max()) >= len(self._irreducible):
                raise ValueError(
                    f"Argument `irreducible` must name a file with a loss for every sample id, but "
                    f"{self.irreducible!r} has {len(self._irreducible)}, and a sample has the id "
                    f"{int(sample_ids.max())}."
                )
            self._irreducible = self._irreducible.to(scores.device)
            return scores - self._irreducible[sample_ids]

    def describe(self) -> str:
        """The rule, and the route of the scores."""
        if self.head_route.of_losses:
            return f"{self.rule} {self.score_name}, {super().describe()}"
        positions = "at scored positions only" if self.head_route.used else "from logits"
        return f"{self.rule} {self.score_name}, {super().describe()}, {positions}{self.head_route.reason}"

    def choose(self, trainer: Trainer, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """Draw rows by the rule."""
        if self.rule == "top":
            return top_rows(scores, k), None
        uniform = self.uniform(trainer, len(scores), scores.device)
        if self.rule == "rank":
            progress = logging_step(trainer) / self._steps
            log_weights = rank_log_weights(scores, self.pressure ** max(0.0, 1 - progress))
            return successive_sample(log_weights, k, uniform), None
        if self.rule == "proportional":
            return successive_sample(floored_log_weights(scores), k, uniform), None
        if self.rule == "drop_high":
            return low_score_sample(scores, self.drop, k, uniform), None
        if self.rule == "selective_backprop":
            pool = torch.cat([self.pool.to(scores), scores])
            beta = min(1 / self.keep - 1, 1e6) if self.beta is None else self.beta
            return pareto_sample(cdf_power(scores, pool, beta), k, uniform), None
        assert self.row_weights is not None
        lengths, ratio = self.scored.lengths, None
        if lengths is None or self.row_weights.positions is False:
            rows, weights = priority_sample(scores, k, uniform)
        else:  # the loss is a mean over positions, of which a long sequence has more
            rows, weights = priority_sample(scores * lengths, k, uniform)
            ratio = torch.where(lengths[rows].sum() > 0, lengths[rows].mean() / lengths.mean(), 1.0)
            weights = weights * ratio
        if not self._probing:
            self.row_weights.set(weights, ratio)
        return rows, weights

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """As in the base; the weights are those of one step only."""
        if self.row_weights is not None:
            if not pl_module.automatic_optimization:  # it may call no hook; a step that returns None has no gradient
                self.row_weights.check()
            self.row_weights.set(None)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_kept(self, trainer: Trainer, rows: Tensor, k: int) -> None:
        """Remember the scores of every rank's candidates, in rank order."""
        if self.rule != "selective_backprop":
            return
        assert self.scored.scores is not None
        scores = gather_rows(trainer, self.scored.scores)
        self.pool = torch.cat([self.pool.to(scores), scores])[-POOL:]

    def rule_statistics(self, choice: Choice) -> dict[str, Tensor | float]:
        """The variance that importance sampling takes out of the gradient, as a factor."""
        if self.rule != "importance" or choice.scores is None:
            return {}
        by_row = self.row_weights is not None and self.row_weights.positions is False
        scores = choice.scores if choice.lengths is None or by_row else choice.scores * choice.lengths
        return {"variance_reduction": variance_reduction(scores)}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam and the weights."""
        super().teardown(trainer, pl_module, stage)
        self.head_route.forget()

    def state_dict(self) -> dict[str, Any]:
        """Counters and the pool of scores, the same on every rank."""
        return {
            **super().state_dict(),
            "score": self.score_name,
            "pool": self.pool,
            "by_head": self.head_route.used,
            "mean_over_positions": None if self.row_weights is None else self.row_weights.positions,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().restore(state)
        if state["score"] == self.score_name:  # scores of another kind cannot be compared
            self.pool = state["pool"]
        self.head_route.used = state["by_head"]
        self._mean_over_positions = state.get("mean_over_positions")


def read_irreducible(file: str) -> Tensor:
    """The irreducible losses that ``curation irreducible`` wrote: fp32 ``[N]`` by sample id.

    Args:
        file: Path of a tensor saved by ``torch.save``.

    Raises:
        ValueError: If the file is missing, or has other contents.
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
