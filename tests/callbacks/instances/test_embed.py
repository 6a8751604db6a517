"""Embeddings are what a layer gives, row by row, and nothing is left behind."""

import pytest
import torch
from helpers import Classifier, LanguageModel, data, loader, texts, trainer
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from curation.batch import SampleIds
from curation.callbacks.instances.embed import embed
from curation.samplers.hard_batches import HardBatchSampler


def test_what_predict_step_returns():
    module = Classifier().eval()
    for ids in (False, True):
        got = embed(trainer(), module, loader(ids=ids, shuffle=False))
        torch.testing.assert_close(got, module(data().tensors[0]).detach())


def test_what_a_layer_gives():
    module = Classifier().eval()
    run = trainer()
    got = embed(run, module, loader(shuffle=False), layer="net.2")
    torch.testing.assert_close(got, module.net[:3](data().tensors[0]).detach())
    assert not module.net[2]._forward_hooks
    assert "batch_to_device" not in vars(run.strategy)
    assert not [c for c in run.callbacks if type(c).__name__ == "_Collect"]


class Sequences(LanguageModel):
    def predict_step(self, batch, batch_idx):
        return self.model(batch["input_ids"], batch["attention_mask"]).logits


def test_sequences_are_averaged_over_their_tokens():
    module, samples = Sequences().eval(), texts(10)
    got = embed(trainer(), module, DataLoader(SampleIds(samples), 4), layer="model.model.norm")
    for i, sample in enumerate(samples):
        length = int(sample["attention_mask"].sum())
        hidden = module.model.model(sample["input_ids"][None], sample["attention_mask"][None]).last_hidden_state[0]
        mask = sample["attention_mask"].bool()
        assert 0 < length <= len(mask)
        torch.testing.assert_close(got[i], hidden[mask].mean(0).detach())


class Convolution(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 5, 3)

    def predict_step(self, batch, batch_idx):
        x, _ = batch
        return self(x.view(-1, 1, 2, 4).repeat(1, 1, 2, 1))


def test_pictures_are_averaged_over_their_pixels():
    assert embed(trainer(), Convolution(), loader(shuffle=False)).shape == (64, 5)


class Reversed:
    def __iter__(self):
        yield from ([7, 6, 5, 4], [3, 2, 1, 0])


def test_nothing_is_left_behind_after_an_exception_and_rubbish_is_named():
    class Twice(Classifier):
        def predict_step(self, batch, batch_idx):
            super().predict_step(batch, batch_idx)
            return super().predict_step(batch, batch_idx)

    class Nothing(Classifier):
        def predict_step(self, batch, batch_idx):
            return None

    module, run = Twice(), trainer()
    with pytest.raises(ValueError, match=r"`net.0` must run once for a batch, but ran 2 times"):
        embed(run, module, loader(shuffle=False), layer="net.0")
    assert not module.net[0]._forward_hooks
    assert "batch_to_device" not in vars(run.strategy)
    with pytest.raises(TypeError, match="`predict_step` must give a tensor, but gave NoneType"):
        embed(trainer(), Nothing(), loader(shuffle=False))
    for sampler in (RandomSampler(data()), HardBatchSampler(data(), 8)):
        with pytest.raises(ValueError, match=f"keep the order .* but has a {type(sampler).__name__}"):
            embed(trainer(), Classifier(), DataLoader(data(), 8, sampler=sampler))
    for part in ({"limit_predict_batches": 1}, {"limit_predict_batches": 0.5}, {"fast_dev_run": True}):
        with pytest.raises(ValueError, match="`trainer` must predict all batches, but has `limit_predict_batches="):
            embed(trainer(**part), Classifier(), loader(shuffle=False))
    with pytest.raises(ValueError, match="must have a batch, but has none"):
        embed(trainer(), Classifier(), DataLoader([], 4))
    with pytest.raises(ValueError, match="must keep the order of the data set, but has a Reversed"):
        embed(trainer(), Classifier(), DataLoader(data(8), batch_sampler=Reversed()))
    with pytest.raises(AttributeError, match="nowhere"):
        embed(trainer(), Classifier(), loader(shuffle=False), layer="nowhere")
