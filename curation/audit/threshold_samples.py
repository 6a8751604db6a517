"""Samples whose labels are wrong on purpose, so that a run shows what a wrong label looks like (arXiv 2001.10528)."""

from typing import Any

import numpy as np

from curation.audit.labels import with_label
from curation.checks import check_flag, check_integer, check_number, check_seed


class ThresholdSamples:
    """A data set in which a share of the samples has a wrong label, which the model then trains on.

    The paper gives them a class of their own, for which the module needs a spare output (``spare=True``). Else every
    one gets one of the other classes, all with equal probability. Their own labels are not audited: a second run with
    another seed audits them. The other samples are as they were.

    Args:
        dataset: Map-style data set of pairs ``(x, y)``, longer tuples, or mappings with ``labels``, ``label`` or
            ``y``; the label is an integer in ``[0, classes)``.
        classes: Number of classes, without a spare one.
        share: Share of the samples, in (0, 1).
        spare: Whether they get the class ``classes``, which no other sample has.
        seed: Seed of the choice and of the labels, in [0, 2^63).

    Attributes:
        ids: int64 ``[M]``, the samples, ascending.

    Raises:
        ValueError: If an argument is out of its range, or no sample is chosen.
        TypeError: If a sample has no label.

    Example:
        >>> samples = ThresholdSamples([("a", 0), ("b", 1), ("c", 0), ("d", 1)], classes=2, share=0.25)
        >>> samples.ids, samples[2]
        (array([2]), ('c', 1))
    """

    def __init__(self, dataset: Any, classes: int, share: float = 0.02, spare: bool = False, seed: int = 0) -> None:
        self.dataset = dataset
        self.classes = check_integer("classes", classes, 2)
        self.share = check_number("share", share, "(0, 1)")
        self.spare = check_flag("spare", spare)
        self.seed = check_seed(seed)
        generator = np.random.default_rng(seed)
        count = round(share * len(dataset))
        if not count:
            raise ValueError(f"Argument `share` must choose a sample of {len(dataset)}, but got {share}.")
        self.ids = np.sort(generator.permutation(len(dataset))[:count])
        self._shift = dict(zip(self.ids.tolist(), generator.integers(1, classes, count).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample, place = self.dataset[index], int(index) % len(self)
        if place not in self._shift:
            return sample

        def wrong(label: Any) -> Any:
            return self.classes if self.spare else (int(label) + self._shift[place]) % self.classes

        return with_label(sample, wrong)
