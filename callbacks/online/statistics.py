"""What is reported of an online selection: metrics, a histogram of scores, a table of candidates, warnings."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from curation.callbacks.lightning.collectives import Totals
from curation.callbacks.lightning.loggers import log_histogram, log_table, takes_histograms
from curation.callbacks.lightning.loop import is_accumulating, logging_step, logs_now
from curation.callbacks.online.choice import Choice, SelectionListener

TABLE_ROWS = 64
TABLE_COLUMNS = ["step", "sample_id", "score", "kept"]
IN_PROGRESS_BAR = ("candidate_loss", "samples_trained")


class SelectionStatistics(SelectionListener):
    """Counts the rows of every choice, and on logging steps writes its statistics as ``curation/<name>``.

    Args:
        more: Further statistics of a choice, by name: the time of training, and what a rule reports.

    Attributes:
        counts: Rows of all ranks that were scored and from which rows were chosen, and that were trained on.
    """

    def __init__(self, more: Callable[[Choice], dict[str, Tensor | float]]) -> None:
        self.counts = Totals(0, 0)
        self._scores = 0  # of this rank, in this process
        self._more = more
        self._not_finite: Tensor | None = None  # stays on the device until something is logged
        self._warned = False
        self._table: deque[list[Any]] = deque(maxlen=TABLE_ROWS)

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Count the rows of a choice; on logging steps log its statistics."""
        chosen = choice.rows is not None and choice.scores is not None
        scored = choice.size if chosen and choice.has_scores else 0
        self.counts.add(trainer, scored, choice.trained)
        self._scores += scored
        if choice.rows is not None and choice.scores is not None:
            not_finite = (~choice.scores.isfinite()).sum()
            self._not_finite = not_finite if self._not_finite is None else self._not_finite + not_finite
        if not logs_now(trainer):
            return
        counts = dict(zip(("samples_scored", "samples_trained"), self.counts.values.float(), strict=True))
        for name, value in {**counts, **self._more(choice), **choice_statistics(choice)}.items():
            pl_module.log(
                f"curation/{name}",
                value,
                prog_bar=name in IN_PROGRESS_BAR,
                on_step=True,
                on_epoch=False,
                batch_size=1,
                sync_dist=name == "candidate_loss",
            )
        self.warn_of_broken_scores()
        if choice.has_scores and takes_histograms(trainer) and not is_accumulating(trainer):
            self._log_scores(trainer, choice)

    def warn_of_broken_scores(self) -> None:
        """Warn once, if scores were not finite."""
        if self._not_finite is not None and not self._warned and int(self._not_finite):
            self._warned = True
            broken = f"{int(self._not_finite)} of {self._scores} scores"
            rank_zero_warn(f"{broken} so far are not finite; such rows are kept last.")

    def log_table(self, trainer: Trainer) -> None:
        """Log a table of the last candidates with their scores and whether they were kept."""
        log_table(trainer, "curation/samples", TABLE_COLUMNS, list(self._table))

    def _log_scores(self, trainer: Trainer, choice: Choice) -> None:
        """Log a histogram of the scores; remember rows for the table."""
        if choice.scores is None or choice.rows is None:
            return
        scores = choice.scores.tolist()
        kept = set(choice.rows.tolist())
        ids = [-1] * len(scores) if choice.sample_ids is None else choice.sample_ids.tolist()
        for row, (sample_id, score) in enumerate(zip(ids, scores, strict=True)):
            self._table.append([logging_step(trainer), sample_id, score, row in kept])
        log_histogram(trainer, "curation/scores", [score for score in scores if abs(score) < float("inf")])


def choice_statistics(choice: Choice) -> dict[str, Tensor | float]:
    """Statistics of one choice.

    Returns:
        ``kept_fraction``, and where the samples have scores ``score_gap`` (mean score of the kept rows minus that of
        all candidates, over finite ones), ``kept_length_ratio`` (the same of lengths, as a quotient) and
        ``candidate_loss``.
    """
    statistics: dict[str, Tensor | float] = {"kept_fraction": choice.trained / choice.size}
    if choice.has_scores and choice.scores is not None and choice.rows is not None:
        scores = choice.scores.masked_fill(~choice.scores.isfinite(), torch.nan)
        statistics["score_gap"] = scores[choice.rows].nanmean() - scores.nanmean()
        if choice.lengths is not None:
            statistics["kept_length_ratio"] = choice.lengths[choice.rows].mean() / choice.lengths.mean()
        if choice.candidate_loss is not None:
            statistics["candidate_loss"] = choice.candidate_loss
    return statistics
