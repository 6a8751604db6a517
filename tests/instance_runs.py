"""What the tests of instance selection in a fit share."""

import numpy as np
from helpers import Classifier, Watch, data
from torch.utils.data import DataLoader, IterableDataset, default_collate

from curation.instances.selection_index import SelectionIndex

X, Y = data().tensors


class Rows(Watch):
    """Which samples every epoch was trained on, and how many batches were validated."""

    def __init__(self):
        super().__init__()
        self.epochs: list[list[int]] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 or not self.epochs:  # or resumed within one
            self.epochs.append([])
            self.validated.append(0)
        self.epochs[-1] += which(batch[0])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.sanity_checking:
            self.validated[-1] += 1


def which(x):
    return [int((X[:, 0] == value).nonzero()) for value in x[:, 0].cpu()]


def saved(path="kept.parquet", indices=range(3, 64, 3), of=64, **changes):
    indices = np.asarray(indices)
    SelectionIndex(indices, np.zeros(len(indices)), np.arange(len(indices)), of, **changes).save(path)
    return str(path)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([data()[i] for i in range(64)])


class Unlabelled(Classifier):
    def training_step(self, batch, batch_idx):
        raise AssertionError("trained")


def unlike(change):
    return DataLoader(data(), 8, collate_fn=lambda samples: change(*default_collate(samples)))
