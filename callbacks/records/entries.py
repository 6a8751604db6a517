"""The rows of a candidate batch as the records enter them."""

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from curation.callbacks.online.choice import Choice
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.samplers.dynamic_data_pruning import DynamicDataPruning


def candidate_entries(callback: Callback, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """Sample ids, scores and counts of the candidates of this rank.

    Args:
        callback: The callback that enters them; errors name it.
        choice: What the selection chose.

    Returns:
        Sample ids int64 ``[B]``; scores fp32 ``[B]``, NaN where no score was made; how often each row is trained on,
        int64 ``[B]``. All are on one device.

    Raises:
        TypeError: If the samples have no ids.
    """
    ids = sample_ids_of(callback, choice)
    unscored = torch.full(ids.shape, torch.nan, device=ids.device)
    if choice.scores is None or choice.rows is None:
        return ids, unscored, torch.ones_like(ids)
    scores = choice.scores.detach().float() if choice.has_scores else unscored
    ids = ids.to(scores.device, non_blocking=True)
    kept = torch.zeros_like(ids).index_add_(0, choice.rows, torch.ones_like(choice.rows))
    return ids, scores, kept


def sample_ids_of(callback: Callback, choice: Choice) -> Tensor:
    """Sample ids of the candidates of this rank, int64 ``[B]``.

    Raises:
        TypeError: If the samples have none.
    """
    if choice.sample_ids is None:
        raise no_sample_ids(callback)
    return choice.sample_ids


def no_sample_ids(callback: Callback) -> TypeError:
    """The error of a callback that needs sample ids."""
    return TypeError(
        f"{type(callback).__name__} needs sample ids: wrap the training data set in "
        "`curation.sample_ids.SampleIds`, and keep its key `sample_id` in a `collate_fn` of your own."
    )


def check_selection(callback: Callback, trainer: Trainer) -> None:
    """Refuse a trainer without a callback that reports what it chooses.

    Raises:
        ValueError: If no callback of the trainer is an ``OnlineSelection`` or ``DynamicDataPruning``.
    """
    reports = (OnlineSelection, DynamicDataPruning)
    if not any(isinstance(c, reports) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"{type(callback).__name__} records an online selection or dynamic pruning, but the trainer has neither."
        )
