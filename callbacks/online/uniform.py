"""Uniform selection: the baseline that every other rule has to beat."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.batch import batch_size
from curation.callbacks.online.online_selection import OnlineSelection


class UniformSelection(OnlineSelection):
    """Keeps rows drawn uniformly without replacement, at the same budget as any other rule.

    The draw depends on the seed, the number of batches seen and the rank only, so a resumed run draws the same.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1].
        when: ``"pays"`` trains on every candidate wherever that is measured to be faster.
        seed: Seed of the random draws, in [0, 2^63); equal on all ranks, which draw differently all the same.
        trim: Drop the padding columns that no kept row uses.
        candidate_batches: Batches of the data loader that make one candidate batch; ``keep`` is then 1 over it, or
            None.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> selection = UniformSelection(keep=0.25, seed=1)
        >>> selection.keep, selection.has_scores
        (0.25, False)
    """

    has_scores = False
    guarded = False  # the module is not called

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Random numbers, uniform in [0, 1): fp32 ``[B]``."""
        return self.uniform(trainer, batch_size(batch), pl_module.device).float()
