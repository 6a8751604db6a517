"""Whose loss is scored: that of the module where it is known, and a word where it is not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, LanguageModel, data, loader, texts, trainer
from torch import nn
from torch.utils.data import DataLoader

from curation.callbacks import HardSampleSelection
from curation.scoring import Criterion, find_criterion, per_sample_grad_norm, per_sample_loss


def said(module, batches, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)  # of dropout: one step of eight must show the difference
        trainer(HardSampleSelection(keep=0.25, **options), max_epochs=1).fit(module, batches)
    return [str(w.message) for w in caught if "which is scored" in str(w.message)]


class WithCriterion(Classifier):
    def __init__(self, criterion, registered=True):
        super().__init__()
        self.criterion = criterion if registered else lambda *a: criterion(*a)
        self.kept = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.kept.append(x)
        return self.criterion(self(x), y)


def criteria():
    weight = torch.tensor([1.0, 4.0, 0.5, 2.0])
    return [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight),
        nn.CrossEntropyLoss(label_smoothing=0.8),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(weight, ignore_index=2, label_smoothing=0.3),
    ]


@pytest.mark.parametrize("index", range(5))
def test_the_settings_of_the_only_criterion_are_scored(index):
    criterion = criteria()[index]
    module = WithCriterion(criterion)
    own = nn.CrossEntropyLoss(
        criterion.weight,
        ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
        reduction="none",
    )
    x, y = (t[:8] for t in data().tensors)
    losses = own(Classifier().eval()(x), y).masked_fill(y == criterion.ignore_index, -1)
    assert said(module, loader(ids=False, shuffle=False)) == []
    assert torch.equal(module.kept[0], x[losses.topk(2).indices.sort().values])


@pytest.mark.parametrize("index", range(1, 3))
def test_settings_that_cannot_be_seen_are_said_once(index):
    (text,) = said(WithCriterion(criteria()[index], registered=False), loader(ids=False, shuffle=False))
    assert "`score_step(self, batch)`" in text
    assert "cross-entropy of `forward(x)`" in text


def test_embeddings_are_said():
    class Compares(Classifier):
        def __init__(self):
            super().__init__()
            self.proxies = nn.Linear(CLASSES, CLASSES)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(10 * self.proxies(self(x)), y)

    assert len(said(Compares(), loader(ids=False))) == 1


def test_nothing_is_said_of_the_loss_that_is_scored():
    assert said(Classifier(), loader(ids=False)) == []
    assert said(LanguageModel(), DataLoader(texts(), 8)) == []


@pytest.mark.parametrize("rows", [(7,), (7, 5)])
@pytest.mark.parametrize("index", range(5))
def test_losses_and_norms_with_settings_are_those_of_torch(rows, index):
    g = torch.Generator().manual_seed(index)
    criterion = find_criterion(nn.ModuleList([criteria()[index]]))
    logits = torch.randn(*rows, 4, generator=g, requires_grad=True)
    targets = criterion.mask(torch.randint(0, 4, rows, generator=g))
    loss, norm = (
        criterion.bind(per_sample_loss)(logits, targets),
        criterion.bind(per_sample_grad_norm)(logits, targets),
    )
    for i, (x, t) in enumerate(zip(logits, targets, strict=True)):
        smoothing = criterion.label_smoothing
        own = F.cross_entropy(x, t, criterion.weight, reduction="none", label_smoothing=smoothing)
        scored = t.ne(-100).sum()
        if not scored:
            assert norm[i].isnan()
            continue
        own = own.sum() / scored
        torch.testing.assert_close(loss[i], own)
        torch.testing.assert_close(norm[i], torch.autograd.grad(own, x)[0].norm())


def test_several_criteria_are_not_guessed_from():
    assert find_criterion(nn.ModuleList(criteria())) == Criterion()
    assert find_criterion(nn.Linear(1, 1)).describe() == ""


def test_targets_that_are_no_classes_name_the_method_to_add():
    batches = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, FEATURES), torch.full((8,), CLASSES)), 8)
    with pytest.raises(TypeError, match=f"{CLASSES} logits came with a target {CLASSES}. Add a method `score_step"):
        trainer(HardSampleSelection(keep=0.25)).fit(Classifier(), batches)
