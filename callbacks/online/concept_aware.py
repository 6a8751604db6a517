"""Concept-aware selection from candidate batches that are on the device already."""

from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.batch import batch_size
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.samplers.concept_coverage import check_concepts, check_length, loaded
from curation.checks import check_choice
from curation.online.concept_aware import diverse_rows
from curation.samplers.concept_aware import Diversity, Frequency
from curation.samplers.concept_choice import Targets, round_targets, target_counts
from curation.samplers.concept_index import ConceptIndex


class ConceptAwareSelection(OnlineSelection):
    """Keeps the rows whose concepts match the targets.

    A :class:`~curation.samplers.concept_aware.ConceptAwareSampler` chooses the same before anything is decoded, and
    from the candidates of all processes; use this where the batches come from elsewhere. Nothing is scored by the
    model. Needs sample ids. On an accelerator the concepts are kept there, padded: 4 bytes times the number of
    samples times the largest number of concepts of a sample, and nothing waits for the device.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1].
        concepts: Concepts of every sample, or the file that
            :meth:`~curation.samplers.concept_index.ConceptIndex.save` wrote. None for the data module's attribute
            ``concepts``.
        objective: ``"diversity"`` or ``"frequency"``.
        targets: Concepts wanted: ``"uniform"``, ``"proportional"`` to the corpus, or weights by name.
        when: ``"pays"`` trains on every candidate wherever that is measured to be faster.
        seed: Seed of the rounding of targets that are not uniform, in [0, 2^63); equal on all ranks.
        trim: Drop the padding columns that no kept row uses.
        candidate_batches: Batches of the data loader that make one candidate batch; ``keep`` is then 1 over it, or
            None.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the samples have no ids.

    Example:
        >>> concepts = ConceptIndex.from_lists([["cat"], ["cat", "dog"], ["dog"], []])
        >>> selection = ConceptAwareSelection(keep=0.5, concepts=concepts)
        >>> selection.describe()
        'diversity of concepts'
    """

    has_scores = False
    guarded = False  # the module is not called

    def __init__(
        self,
        keep: float | None = None,
        concepts: ConceptIndex | str | None = None,
        objective: Literal["diversity", "frequency"] = "diversity",
        targets: Targets = "uniform",
        when: Literal["always", "pays"] = "always",
        seed: int = 0,
        trim: bool = True,
        candidate_batches: int = 1,
    ) -> None:
        super().__init__(keep, when, seed, trim, candidate_batches)
        check_concepts(concepts)
        self.concepts = concepts
        self.objective = check_choice("objective", objective, ("diversity", "frequency"))
        self.targets = targets
        self._index: ConceptIndex | None = None
        self._padded: Tensor | None = None
        self._wanted: tuple[int, Tensor] | None = None

    def describe(self) -> str:
        """The objective."""
        return f"{self.objective} of concepts"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the concepts."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._index = loaded(self.concepts) or getattr(trainer.datamodule, "concepts", None)  # type: ignore[attr-defined]
            if self._index is None:
                raise ValueError(
                    "Argument `concepts` must be given where the data module has no `concepts`, but got None."
                )
            target_counts(self._index, self.targets, 1)  # raises now, not in the first step
            self._padded = self._wanted = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are concepts for every sample."""
        super().on_train_start(trainer, pl_module)
        assert self._index is not None
        check_length(self._index, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the concepts."""
        super().teardown(trainer, pl_module, stage)
        self._index = self._padded = self._wanted = None

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Scores fp32 ``[B]``: ``k`` for the row that is chosen first, 1 for the last, and 0 for rows not chosen."""
        if sample_ids is None:
            raise TypeError(
                "ConceptAwareSelection needs sample ids: wrap the training data set in "
                "`curation.sample_ids.SampleIds`, "
                "and keep its key `sample_id` in a `collate_fn` of your own."
            )
        assert self._index is not None
        size = batch_size(batch)
        k = min(size, self.k or size)
        draw = np.random.default_rng((self.seed, self.batches, trainer.global_rank)).random()
        rows = self._rows(sample_ids, k, draw)
        return torch.zeros(size, device=rows.device).index_add_(
            0, rows, torch.arange(k, 0, -1, dtype=torch.float32, device=rows.device)
        )

    def _rows(self, sample_ids: Tensor, k: int, draw: float) -> Tensor:
        assert self._index is not None
        device = sample_ids.device
        if self._wanted is None or self._wanted[0] != k:
            counts = torch.from_numpy(target_counts(self._index, self.targets, k))
            self._wanted = k, (counts.float() if device.type == "mps" else counts).to(device)  # MPS has no fp64
        if device.type != "cpu":
            return self.on_device(sample_ids, k, draw)
        candidates = self._index.take(sample_ids.numpy())
        rule = Diversity() if self.objective == "diversity" else Frequency()
        targets = self._wanted[1].numpy()
        targets = targets if self.targets == "uniform" else round_targets(targets, draw)
        return torch.from_numpy(rule.choose(candidates, k, targets, np.zeros(len(candidates))))

    def on_device(self, sample_ids: Tensor, k: int, draw: float) -> Tensor:
        """The rows of :meth:`score` without a host synchronisation: int64 ``[k]``."""
        assert self._index is not None
        assert self._wanted is not None
        if self._padded is None:
            self._padded = torch.from_numpy(self._index.padded()).to(sample_ids.device)
        concepts = self._padded[sample_ids]
        if self.objective == "frequency":
            return (concepts >= 0).sum(1).argsort(descending=True, stable=True)[:k]
        targets = self._wanted[1]
        if self.targets != "uniform":
            # as `round_targets` does
            targets = (targets.cumsum(0) + draw + 1e-9).floor().diff(prepend=targets.new_zeros(1))
        return diverse_rows(concepts, k, targets)
