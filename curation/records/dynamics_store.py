"""What training shows of every sample: moments of its losses, margins and probabilities over its visits."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from curation.records.sample_store import SampleStore, repeated
from curation.scoring.outcomes import OUTCOMES


class DynamicsStore(SampleStore):
    """Streaming moments of every sample over its visits; 61 bytes a sample.

    Means and sums of squared deviations are updated by Welford's formulas, so no visit is stored. The suggested class
    is a weighted majority vote (Boyer and Moore, 1981) in which each visit votes for the largest class other than the
    label, with its probability as the weight: it is the class with more than half of all votes where there is one. It
    costs 8 bytes where a mean for each class would cost 4 bytes a class.

    Args:
        size: Number of samples; ids are in [0, size).
        device: Device of the record.

    Attributes:
        visits: int32 ``[N]``, how often the sample was trained on.
        loss, margin, probability: fp32 ``[N]``, means over the visits; 0 before the first, NaN where only losses are
            known.
        loss_squares, margin_squares, probability_squares: fp32 ``[N]``, sums of squared deviations from the means.
        rival_probability: fp32 ``[N]``, mean probability of the largest other class; 0 of sequences and losses alone.
        last_loss: fp32 ``[N]``, the loss of the last visit; NaN before the first.
        right: int32 ``[N]``, visits at which the prediction was right.
        forgotten: int32 ``[N]``, visits at which it was wrong and had been right at the visit before
            (arXiv 1812.05159).
        label: int32 ``[N]``, the label of the last visit; -1 of sequences and of losses alone.
        suggested: int32 ``[N]``, the class with the majority of the votes; -1 as ``label``.
        votes: fp32 ``[N]``, by which weight it leads.
        worst: int32 ``[N]``, the least probable token of a sequence at its last visit, counted from 0 over the scored
            ones.
        was_right: bool ``[N]``, whether the prediction was right at the last visit.

    Raises:
        ValueError: If ``size`` is no positive integer.

    Example:
        >>> from curation.scoring.outcomes import row_outcomes
        >>> store = DynamicsStore(3)
        >>> store.update(torch.tensor([2]), row_outcomes(torch.tensor([[3.0, 1.0]]), torch.tensor([1])))
        >>> store.margin, store.suggested
        (tensor([ 0.,  0., -2.]), tensor([-1, -1,  0], dtype=torch.int32))
    """

    columns: ClassVar = {
        "visits": (torch.int32, 0),
        **{
            name: (torch.float32, 0.0)
            for value in ("loss", "margin", "probability")
            for name in (value, f"{value}_squares")
        },
        "rival_probability": (torch.float32, 0.0),
        "last_loss": (torch.float32, torch.nan),
        "right": (torch.int32, 0),
        "forgotten": (torch.int32, 0),
        "label": (torch.int32, -1),
        "suggested": (torch.int32, -1),
        "votes": (torch.float32, 0.0),
        "worst": (torch.int32, 0),
        "was_right": (torch.bool, 0),
    }
    visits: Tensor
    loss: Tensor
    margin: Tensor
    probability: Tensor
    loss_squares: Tensor
    margin_squares: Tensor
    probability_squares: Tensor
    rival_probability: Tensor
    last_loss: Tensor
    right: Tensor
    forgotten: Tensor
    label: Tensor
    suggested: Tensor
    votes: Tensor
    worst: Tensor
    was_right: Tensor

    def update(self, ids: Tensor, outcomes: Tensor) -> None:
        """Add the rows that were trained on; of an id that occurs twice the first row.

        Args:
            ids: int64 ``[B]`` in [0, N); rows with the id -1 are left out.
            outcomes: fp32 ``[B, 8]``, the columns of :func:`~curation.scoring.outcomes.row_outcomes`; rows whose loss
                is not finite are left out.

        Raises:
            TypeError: If the ids are not int64.
            ValueError: If the shapes are others, or an id is not in [-1, N) (checked on a CPU only).
        """
        if outcomes.shape != (len(ids), len(OUTCOMES)):
            raise ValueError(
                f"Argument `outcomes` must be [{len(ids)}, {len(OUTCOMES)}], but got {list(outcomes.shape)}."
            )
        new: dict[str, Any] = dict(zip(OUTCOMES, outcomes.unbind(1), strict=True))
        entered = new["loss"].isfinite() & ~repeated(ids)
        at = self.places(ids).where(entered, len(self))
        rows = self._rows
        visits = rows["visits"][at] + 1
        rows["visits"][at] = visits
        for name in ("loss", "margin", "probability"):
            before = rows[name][at]
            mean = before + (new[name] - before) / visits
            rows[name][at] = mean
            squares = f"{name}_squares"
            rows[squares][at] = rows[squares][at] + (new[name] - before) * (new[name] - mean)
        before = rows["rival_probability"][at]
        rows["rival_probability"][at] = before + (new["rival_probability"] - before) / visits
        rows["last_loss"][at] = new["loss"]
        right = new["right"] > 0
        rows["right"][at] = rows["right"][at] + right.int()
        rows["forgotten"][at] = rows["forgotten"][at] + (rows["was_right"][at] & ~right).int()
        rows["was_right"][at] = right
        rival, votes, suggested = new["rival"].int(), rows["votes"][at], rows["suggested"][at]
        votes = torch.where(rival == suggested, votes + new["rival_probability"], votes - new["rival_probability"])
        rows["suggested"][at] = torch.where(votes < 0, rival, suggested)
        rows["votes"][at] = votes.abs()
        for name in ("label", "worst"):
            rows[name][at] = new[name].int()
