"""Weights that come with the data, against losses that are weighed by hand."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LanguageModel, data, loader, texts, trainer
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from curation.callbacks import HardSampleSelection, TokenWeightedLoss, WeightedLoss

WEIGHTS = torch.rand(16, generator=torch.Generator().manual_seed(0)) * 2


def triples(weights=WEIGHTS):
    return DataLoader(TensorDataset(*data(16).tensors, weights), 8)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Linear(8, 4)
        self.gradients = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        assert len(batch) == 2
        return self.loss(batch)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        assert len(batch) == 2

    def on_after_backward(self):
        self.gradients.append(self.net.weight.grad.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Squares(Net):
    def __init__(self):
        super().__init__()
        self.sample_losses = None

    def loss(self, batch):
        self.sample_losses = (self(batch[0])[:, 0] - batch[1]).square()
        return self.sample_losses.mean()


class Takes(Net):
    def __init__(self):
        super().__init__()
        self.sample_weights = None

    def loss(self, batch):
        return (self.sample_weights * F.cross_entropy(self(batch[0]), batch[1], reduction="none")).mean()


def cross_entropies(module, x, y):
    return F.cross_entropy(module(x), y, reduction="none")


def squares(module, x, y):
    return (module(x)[:, 0] - y).square()


@pytest.mark.parametrize(("module", "losses"), [(Net, cross_entropies), (Takes, cross_entropies), (Squares, squares)])
def test_gradients_are_those_of_the_weighted_loss(module, losses):
    fitted, by_hand = module(), module()
    trainer(WeightedLoss(2), max_epochs=1).fit(fitted, triples(), triples())
    optimizer = by_hand.configure_optimizers()
    for step, (x, y, w) in enumerate(triples()):
        optimizer.zero_grad()
        (w * losses(by_hand, x, y)).mean().backward()
        torch.testing.assert_close(fitted.gradients[step], by_hand.net.weight.grad)
        optimizer.step()


def test_no_sample_is_taken_out_of_a_list_of_them():
    class Counts(Net):
        def predict_step(self, batch, batch_idx):
            return len(batch)

    lists = DataLoader(TensorDataset(*data(16).tensors), 8, collate_fn=list)
    assert trainer(WeightedLoss(1)).predict(Counts(), lists) == [8, 8]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool, torch.bfloat16])
def test_weights_may_be_any_numbers(dtype):
    kept = torch.arange(16) % 2
    fitted, by_hand = Net(), Net()
    trainer(WeightedLoss(2), max_epochs=1, limit_train_batches=1).fit(fitted, triples(kept.to(dtype)))
    x, y = (column[:8] for column in data(16).tensors)
    (kept[:8] * cross_entropies(by_hand, x, y)).mean().backward()
    torch.testing.assert_close(fitted.gradients[0], by_hand.net.weight.grad)


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {**texts(16)[i], "weight": WEIGHTS[i]}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_means_over_rows_over_positions_and_mixtures_of_both(share):
    """``share`` of the loss is a mean over positions."""

    def reduce(losses, scored, weights):
        weighted = losses * scored * weights[:, None]
        rows = (weighted.sum(1) / scored.sum(1)).mean()
        return share * weighted.sum() / scored.sum() + (1 - share) * rows

    class Model(LanguageModel):
        def training_step(self, batch, batch_idx):
            assert "weight" not in batch
            return self.loss(batch, torch.ones(len(batch["labels"])))

        def loss(self, batch, weights):
            logits = self.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            targets = batch["labels"][:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
            return reduce(losses, targets.ne(-100), weights)

        def on_after_backward(self):
            self.gradient = self.model.lm_head.weight.grad.clone()

    fitted, by_hand = Model(), Model()
    by_hand.load_state_dict(fitted.state_dict())
    trainer(WeightedLoss(), max_epochs=1).fit(fitted, DataLoader(Texts(), 16))
    (batch,) = DataLoader(Texts(), 16)
    by_hand.loss(batch, batch["weight"]).backward()
    torch.testing.assert_close(fitted.gradient, by_hand.model.lm_head.weight.grad, atol=1e-6, rtol=1e-4)


class Penalised(Net):
    def loss(self, batch):
        return super().loss(batch) + self.net.weight.square().sum()


@pytest.mark.parametrize(
    ("module", "callback", "batches", "error", "says"),
    [
        (
            Net,
            WeightedLoss(),
            triples(),
            TypeError,
            "`column` must name weights in the batch, but it has no 'weight'",
        ),
        (Net, WeightedLoss(3), triples(), TypeError, "it has no 3"),
        (Net, WeightedLoss(0), triples(), ValueError, r"one weight for each of 8 rows, but is \[8, 8\]"),
        (
            Net,
            WeightedLoss(2),
            triples(WEIGHTS[:, None]),
            ValueError,
            r"one weight for each of 8 rows, but is \[8, 1\]",
        ),
        (Net, WeightedLoss(2), triples(-WEIGHTS), ValueError, "finite and not negative"),
        (Penalised, WeightedLoss(2), triples(), TypeError, "a part of it is not made of the logits"),
    ],
)
def test_what_cannot_be_weighed_is_refused(module, callback, batches, error, says):
    with pytest.raises(error, match=says):
        trainer(callback, max_epochs=1).fit(module(), batches)


def test_two_callbacks_that_weigh_rows_are_refused():
    importance = HardSampleSelection(keep=0.5, rule="importance")
    with pytest.raises(ValueError, match="cannot weigh rows that HardSampleSelection weighs"):
        trainer(WeightedLoss(2), importance).fit(Net(), loader())


@pytest.mark.parametrize("column", [-1, True, 1.5, ""])
def test_a_column_is_a_key_or_a_place(column):
    with pytest.raises((TypeError, ValueError), match="`column`"):
        WeightedLoss(column)


class Tokens(LanguageModel):
    """Keeps the gradient of every backward pass."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gradients = []

    def on_after_backward(self):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.parameters()]).double())
        self.zero_grad()


def cut(samples):
    """A batch without padding columns."""
    batch = torch.utils.data.default_collate(samples)
    width = int(batch["attention_mask"].sum(1).max())
    return {name: values[:, :width] for name, values in batch.items()}


def labels_of(samples):
    return sum(int((s["labels"][1:] != -100).sum()) for s in samples)


@pytest.mark.parametrize("kind", ["logits", "sample_weights"])
@pytest.mark.parametrize("seed", range(3))
def test_a_token_weighs_the_same_in_every_batch_as_in_one_large_batch(kind, seed):
    class Taking(Tokens):
        def __init__(self):
            super().__init__()
            self.sample_weights = None

        def training_step(self, batch, batch_idx):
            logits, labels = self.model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
            weights = 1 if self.sample_weights is None else self.sample_weights[:, None]
            return (losses * weights).sum() / labels[:, 1:].ne(-100).sum()

    samples, sizes = texts(24), torch.randint(2, 6, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
    places = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).split([*sizes, 24 - sum(sizes)])
    module, whole = (Tokens() if kind == "logits" else Taking() for _ in range(2))
    callback = TokenWeightedLoss(tokens=labels_of(samples) / len(places))
    batches = DataLoader(samples, batch_sampler=[p.tolist() for p in places], collate_fn=cut)
    trainer(callback, max_epochs=1).fit(module, batches)
    trainer(max_epochs=1).fit(whole, DataLoader(samples, 24, collate_fn=cut))
    mean = torch.stack(module.gradients).mean(0)
    torch.testing.assert_close(mean, whole.gradients[0], rtol=1e-4, atol=1e-6)
    assert callback.batches == len(places)
    plain = Tokens()
    trainer(max_epochs=1).fit(plain, batches)
    assert not torch.allclose(torch.stack(plain.gradients).mean(0), whole.gradients[0], rtol=1e-2, atol=1e-4)


def test_a_mean_over_rows_is_refused():
    class Rows(Tokens):
        def training_step(self, batch, batch_idx):
            logits, labels = self.model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
            return (losses.sum(1) / labels[:, 1:].ne(-100).sum(1)).mean()

    with pytest.raises(TypeError, match="mean over tokens, but that of Rows is a mean over rows"):
        trainer(TokenWeightedLoss(tokens=9.0), max_epochs=1).fit(Rows(), DataLoader(texts(8), 8, collate_fn=cut))


def test_batches_without_labels_are_refused():
    with pytest.raises(TypeError, match=r"`labels` \[B, T\]"):
        trainer(TokenWeightedLoss(tokens=9.0), max_epochs=1).fit(Net(), loader())
