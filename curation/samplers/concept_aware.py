"""Concept-aware batches, chosen before anything is decoded (arXiv 2511.20643)."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from curation.checks import check_integer, check_number
from curation.samplers.concept_choice import (
    ConceptObjective,
    Diversity,
    FirstCome,
    Frequency,
    MovingTargets,
    Targets,
    choose_diverse,
    round_targets,
    target_counts,
)
from curation.samplers.concept_index import ConceptIndex
from curation.samplers.global_batch import SequenceSampler

__all__ = [
    "ConceptAwareSampler",
    "ConceptIndex",
    "ConceptObjective",
    "Diversity",
    "FirstCome",
    "Frequency",
    "MovingTargets",
    "choose_diverse",
    "target_counts",
]


class ConceptAwareSampler(SequenceSampler):
    """Yields the indices of batches, each the best ``batch_size`` of a random super-batch by their concepts.

    An epoch is one shuffled pass over the data set in super-batches; its rest is left out. Give it to a
    ``DataLoader`` as ``sampler``, with the same ``batch_size`` and without ``shuffle``: alone, or under DDP, where
    every process chooses the same global batch of ``batch_size`` times the number of processes without communication
    and takes its part. So the batches are those of one process with the whole batch size. They depend on ``seed`` and
    epoch only: a run resumes with :class:`curation.callbacks.ExactResume`, outside of Lightning with ``state_dict``.

    Memory: the index, and 8 bytes a sample for the order of the epoch, 16 with a visit penalty. A sampler cannot see
    whether the loader has its batch size and the data set as many samples;
    :class:`curation.callbacks.ConceptCoverageMonitor` checks both.

    Args:
        concepts: Concepts of every sample of the data set, in its order.
        batch_size: Samples of a batch, per process.
        super_batch_size: Candidates for a batch, per process; ``1 - batch_size / super_batch_size`` of the data is
            discarded undecoded, 0.8 in the paper.
        objective: ``"diversity"`` approaches the targets; ``"frequency"`` takes the samples with most concepts; or
            any :class:`~curation.samplers.concept_choice.ConceptObjective`.
        targets: Frequencies of the concepts to approach: ``"uniform"``, ``"proportional"`` to the corpus, or weights
            by name (:func:`~curation.samplers.concept_choice.target_counts`); or
            :class:`~curation.samplers.concept_choice.MovingTargets`, a schedule of these by the samples that all
            processes were given, which goes on in a resumed run. All but the first are rounded at random, so that
            they are met on average (:func:`~curation.samplers.concept_choice.round_targets`).
        visit_penalty: Amount subtracted from the gain of a candidate for every earlier batch that it was in, so that
            rare samples are not repeated too often; gains of the diversity objective lie in [0, 2]. To begin in a
            later epoch, the choices of the epochs before are made again.
        seed: Seed of the order, which also breaks ties; equal on all ranks.

    Raises:
        ValueError: If an argument has the wrong type or is out of its range, or a target is unknown.
        TypeError: If ``concepts`` is no :class:`~curation.samplers.concept_index.ConceptIndex`.

    Example:
        >>> concepts = ConceptIndex.from_lists([["cat"]] * 5 + [["dog"]])
        >>> rows = list(ConceptAwareSampler(concepts, batch_size=2, super_batch_size=6))
        >>> 5 in rows  # the only dog
        True
    """

    def __init__(
        self,
        concepts: ConceptIndex,
        batch_size: int,
        super_batch_size: int,
        objective: Literal["diversity", "frequency"] | ConceptObjective = "diversity",
        targets: Targets | MovingTargets = "uniform",
        visit_penalty: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not isinstance(concepts, ConceptIndex):
            raise TypeError(f"Argument `concepts` must be a ConceptIndex, but got {type(concepts).__name__}.")
        check_integer("batch_size", batch_size, 1)
        check_integer("super_batch_size", super_batch_size, 1)
        check_integer("seed", seed, 0)
        check_number("visit_penalty", visit_penalty, "[0, inf)")
        if not batch_size <= super_batch_size <= len(concepts):
            raise ValueError(
                f"Argument `super_batch_size` must be in [{batch_size}, {len(concepts)}], from `batch_size` to the "
                f"size of the data set, but got {super_batch_size!r}."
            )
        if isinstance(objective, str):
            named: dict[str, type[ConceptObjective]] = {"diversity": Diversity, "frequency": Frequency}
            objective = named[objective]() if objective in named else objective
        if not isinstance(objective, ConceptObjective):
            raise ValueError(
                f"Argument `objective` must be 'diversity', 'frequency' or a ConceptObjective, but got {objective!r}."
            )
        # Raises now, not in the first step.
        targets.counts(concepts, 1) if isinstance(targets, MovingTargets) else target_counts(concepts, targets, 1)
        super().__init__(concepts, seed)
        self.concepts = concepts
        self.batch_size = batch_size
        self.super_batch_size = super_batch_size
        self.objective: ConceptObjective = objective
        self.targets = targets
        self.visit_penalty = visit_penalty
        self._yielded = 0  # batches of this epoch
        self._start = 0
        # Sizes, an epoch, and how often samples were chosen before it.
        self._visits: tuple[list[int], int, np.ndarray] = [], 0, np.zeros(0, np.int32)

    def __len__(self) -> int:
        """Indices of an epoch, per process.

        Raises:
            ValueError: If the data set is smaller than the super-batch of all processes.
        """
        processes = self._place[1]
        if len(self.concepts) < self.super_batch_size * processes:
            raise ValueError(
                f"Argument `super_batch_size` must be at most {len(self.concepts) // processes}, the data set over "
                f"{processes} processes, but got {self.super_batch_size}."
            )
        return len(self.concepts) // (self.super_batch_size * processes) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is iterated next; Lightning calls it."""
        if epoch != self.epoch:
            self._start = self._yielded = 0
        super().set_epoch(epoch)

    @property
    def sizes(self) -> list[int]:
        """Rows of a batch and of a super-batch of all processes."""
        return [size * self._place[1] for size in (self.batch_size, self.super_batch_size)]

    def samples(self, sizes: list[int]) -> int:
        """Samples of the whole super-batches."""
        k, size = sizes
        return len(self.concepts) // size * k

    def __iter__(self) -> Iterator[int]:
        self._take_epoch()
        rank, processes = self._place
        len(self)  # raises where there are too few samples
        start, self._start, self._yielded = self._start, 0, self._start
        for batch in self.global_batches(self.epoch, self.sizes, start):
            self._yielded += 1
            yield from self.share(batch, rank, processes).tolist()

    def global_batches(self, epoch: int, sizes: list[int], start: int = 0) -> Iterator[np.ndarray]:
        """The global batches of an epoch from ``start``: int64 ``[batch_size * processes]``, in order of choice."""
        (k, size), targets = sizes, self.targets
        if isinstance(targets, MovingTargets):
            counts = targets.counts(self.concepts, k)
        else:
            counts = target_counts(self.concepts, targets, k)
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(len(self.concepts))
        draws = draw.random(len(order) // size)
        visits = self._visits_before(epoch, sizes).copy() if self.visit_penalty else None
        nothing = np.zeros(size)
        for step in range(0 if self.visit_penalty else start, len(draws)):
            drawn = order[step * size : (step + 1) * size]
            penalties = nothing if visits is None else self.visit_penalty * visits[drawn]
            wanted = counts
            if isinstance(targets, MovingTargets):
                wanted = targets.at(counts, (epoch * len(draws) + step) * k)
            rounded = wanted if targets == "uniform" else round_targets(wanted, draws[step])
            rows = np.asarray(self.objective.choose(self.concepts.take(drawn), k, rounded, penalties))
            chosen = drawn[_check_rows(rows, k, size, self.objective)]
            if visits is not None:
                visits[chosen] += 1
                if step == len(draws) - 1:  # now, since a loader may not ask for more
                    self._visits = sizes, epoch + 1, visits
            if step >= start:
                yield chosen

    def _visits_before(self, epoch: int, sizes: list[int]) -> np.ndarray:
        """How often every sample was chosen before an epoch: int32 ``[N]``. Chooses again where that is not known."""
        if self._visits[0] != sizes or self._visits[1] > epoch:
            self._visits = sizes, 0, np.zeros(len(self.concepts), np.int32)
        for earlier in range(self._visits[1], epoch):
            for _ in self.global_batches(earlier, sizes):
                pass
        return self._visits[2]

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """The epoch, the number of its batches so far, and the sizes and seed that the batches depend on.

        Args:
            batches: Batches of this epoch that were trained on. None for the batches yielded so far, of which loader
                workers ask for some in advance.
        """
        return {
            "epoch": self.epoch,
            "batches": self._yielded if batches is None else batches,
            "of": [len(self.concepts), *self.sizes, self.visit_penalty, self.seed],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` in the next iteration; only the number of processes may differ.

        Raises:
            ValueError: If the state belongs to other data, other global sizes, another penalty or another seed.
        """
        stream = self.state_dict()["of"]
        if state["of"] != stream:
            raise ValueError(
                "The state is of another stream: samples, batch and super-batch of all processes, penalty and seed "
                f"were {state['of']} and now are {stream}."
            )
        super().set_epoch(state["epoch"])
        self._start = self._yielded = state["batches"]


def _check_rows(rows: np.ndarray, k: int, size: int, objective: ConceptObjective) -> np.ndarray:
    inside = rows.dtype.kind in "iu" and rows.shape == (k,) and rows.min() >= 0 and rows.max() < size
    if not inside or len(np.unique(rows)) != k:
        raise ValueError(
            f"{type(objective).__name__}.choose must give {k} different positions in [0, {size}), but gave "
            f"{rows.dtype} {list(rows.shape)}."
        )
    return rows
