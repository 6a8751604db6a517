"""A sampler yields the indices of the epoch that is trained on, also to loader workers of a fit that is resumed."""

import pytest
from helpers import Classifier, Watch, data, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from curation.callbacks import ExactResume
from curation.samplers.concept_aware import ConceptAwareSampler, ConceptIndex
from curation.samplers.subset import SubsetSampler

SAMPLERS = {
    "concepts": lambda: ConceptAwareSampler(ConceptIndex.from_lists([[i % 5] for i in range(64)]), 8, 16),
    "subset": lambda: SubsetSampler(range(64), range(0, 64, 2)),
}
PLACES = {
    "epoch end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "last batch": {"every_n_train_steps": 4},
}


def fit(folder, sampler, epochs, place, workers, *callbacks, **resume):
    watch, save = Watch(), ModelCheckpoint(folder, "{step}", save_top_k=-1, **PLACES[place])
    run = trainer(*callbacks, watch, save, max_epochs=epochs, enable_checkpointing=True)
    train = DataLoader(data(), 8, sampler=sampler, num_workers=workers)
    run.fit(Classifier(), train, DataLoader(data(8), 8), **resume)
    return [batch[0][:, 0].tolist() for batch in watch.batches]


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("exact", [False, True], ids=["alone", "exact resume"])
def test_workers_get_the_indices_of_the_epoch(tmp_path, kind, place, exact):
    def callbacks():
        return [ExactResume()] if exact else []

    whole = fit(tmp_path / "whole", SAMPLERS[kind](), 3, place, 0, *callbacks())
    saved = tmp_path / "whole/step=4.ckpt"
    assert len({str(whole[4 * epoch : 4 * epoch + 4]) for epoch in range(3)}) == 3
    for workers in (0, 1):
        assert (
            fit(tmp_path / "resumed", SAMPLERS[kind](), 3, place, workers, *callbacks(), ckpt_path=saved) == whole[4:]
        )


def test_a_sampler_begins_again_in_another_fit(tmp_path):
    sampler = SAMPLERS["subset"]()
    assert fit(tmp_path / "a", sampler, 2, "epoch end", 1) == fit(tmp_path / "b", sampler, 2, "epoch end", 1)
