"""Twelve projects of a stranger: what their own modules need for a selection by their losses."""

import math
import textwrap

import pytest
import torch
import torch.nn.functional as F
from helpers import trainer
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError
from transformers import BertConfig, BertModel

from curation.callbacks import HardSampleSelection, SelectionLedger, UtilityDiversitySelection
from curation.records import Ledger
from curation.sample_ids import SampleIds

ROWS = 32


class Project(LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.build()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def numbers(self, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))

    def classes(self, count, *shape):
        return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(count))


class Regression(Project):
    """Keeps what it predicted, and a metric."""

    def build(self):
        self.net, self.criterion, self.mse = nn.Linear(6, 1), nn.HuberLoss(), MeanSquaredError()
        self.predicted = []

    def forward(self, x):
        return self.net(x)[:, 0]

    def training_step(self, batch, batch_idx):
        x, y = batch
        prediction = self(x)
        self.predicted.append(prediction.detach())
        self.mse(prediction, y)
        loss = self.criterion(prediction, y)
        self.log_dict({"loss": loss, "mse": self.mse})
        return {"loss": loss, "prediction": prediction.detach()}

    def data(self):
        return self.numbers(ROWS, 6), self.numbers(ROWS)

    def losses(self, x, y):
        return F.huber_loss(self(x), y, reduction="none")


class MultiLabel(Project):
    def build(self):
        self.net = nn.Linear(6, 5)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self.net(batch["x"]), batch["labels"])

    def data(self):
        return {"x": self.numbers(ROWS, 6), "labels": self.classes(2, ROWS, 5).float()}

    def losses(self, x, labels):
        return F.binary_cross_entropy_with_logits(self.net(x), labels, reduction="none").mean(1)


class OneLogit(Project):
    """[B, 1] with integer labels, which look like classes."""

    def build(self):
        self.net, self.criterion = nn.Linear(6, 1), nn.BCEWithLogitsLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self(x).squeeze(1), y.float())

    def data(self):
        return self.numbers(ROWS, 6), self.classes(2, ROWS)

    def losses(self, x, y):
        return F.binary_cross_entropy_with_logits(self(x)[:, 0], y.float(), reduction="none")


class Mixup(Project):
    """Labels of two rows for each."""

    def build(self):
        self.net = nn.Linear(6, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        share = 0.7
        logits = self.net(share * x + (1 - share) * x.flip(0))
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y.flip(0))

    def data(self):
        return self.numbers(ROWS, 6), self.classes(4, ROWS)

    def losses(self, x, y):
        logits = self.net(0.7 * x + 0.3 * x.flip(0))
        one, other = (F.cross_entropy(logits, labels, reduction="none") for labels in (y, y.flip(0)))
        return 0.7 * one + 0.3 * other


class Segmentation(Project):
    """Some pixels have no label."""

    def build(self):
        self.net = nn.Conv2d(2, 3, 3, padding=1)
        self.criterion = nn.CrossEntropyLoss(ignore_index=255)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch["image"]), batch["mask"])

    def data(self):
        mask = self.classes(3, ROWS, 4, 4)
        mask[:, 0] = 255
        return {"image": self.numbers(ROWS, 2, 4, 4), "mask": mask}

    def losses(self, image, mask):
        losses = F.cross_entropy(self(image), mask, ignore_index=255, reduction="none").flatten(1)
        return losses.sum(1) / mask.ne(255).flatten(1).sum(1)


class Detection(Project):
    """Boxes and classes."""

    def build(self):
        self.boxes, self.kinds = nn.Linear(6, 4), nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        boxes = F.smooth_l1_loss(self.boxes(batch["x"]), batch["boxes"])
        kinds = F.cross_entropy(self.kinds(batch["x"]), batch["kinds"])
        self.log("train/boxes", boxes)
        return kinds + 2.5 * boxes

    def data(self):
        return {"x": self.numbers(ROWS, 6), "boxes": self.numbers(ROWS, 4), "kinds": self.classes(3, ROWS)}

    def losses(self, x, boxes, kinds):
        boxes = F.smooth_l1_loss(self.boxes(x), boxes, reduction="none").mean(1)
        return F.cross_entropy(self.kinds(x), kinds, reduction="none") + 2.5 * boxes


class MetricLearning(Project):
    def build(self):
        self.net, self.criterion = nn.Linear(6, 4), nn.TripletMarginLoss()

    def training_step(self, batch, batch_idx):
        return self.criterion(*map(self.net, batch))

    def data(self):
        return self.numbers(ROWS, 6), self.numbers(ROWS, 6) + 1, self.numbers(ROWS, 6).flip(0)

    def losses(self, *batch):
        return F.triplet_margin_loss(*map(self.net, batch), reduction="none")


class Diffusion(Project):
    """Predicts the noise that the step draws."""

    def build(self):
        self.net = nn.Conv2d(1, 1, 3, padding=1)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise = torch.randn_like(x)
        return F.mse_loss(self.net(x + noise), noise)

    def data(self):
        return (self.numbers(ROWS, 1, 4, 4),)

    losses = None  # random


class Contrastive(Project):
    def build(self):
        self.net, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        a, b = (F.normalize(self.net(x), dim=1) for x in batch)
        similarity, pairs = self.scale.exp() * a @ b.T, torch.arange(len(a))
        return (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.T, pairs)) / 2

    def data(self):
        return self.numbers(ROWS, 6), self.numbers(ROWS, 6) + 0.5

    def losses(self, *batch):
        a, b = (F.normalize(self.net(x), dim=1) for x in batch)
        similarity, pairs = self.scale.exp() * a @ b.T, torch.arange(len(a))
        both = [F.cross_entropy(s, pairs, reduction="none") for s in (similarity, similarity.T)]
        return sum(both) / 2


class Autoencoder(Project):
    """Variational: a formula of its own in its loss."""

    def build(self):
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def terms(self, x):
        mean, log_variance = self.encoder(x).chunk(2, 1)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
        return self.decoder(mean), divergence

    def training_step(self, batch, batch_idx):
        decoded, divergence = self.terms(batch["x"])
        return F.mse_loss(decoded, batch["x"], reduction="sum") / len(decoded) + 0.1 * divergence.mean()

    def data(self):
        return {"x": self.numbers(ROWS, 6)}

    def losses(self, x):
        decoded, divergence = self.terms(x)
        return (decoded - x).square().sum(1) + 0.1 * divergence


class OwnFormula(Project):
    def build(self):
        self.net = nn.Linear(6, 2)

    def training_step(self, batch):
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def data(self):
        return self.numbers(ROWS, 6), self.numbers(ROWS, 2)

    def losses(self, x, y):
        return (self.net(x) - y).square().mean(1)


class BackboneAndHead(Project):
    """A model of transformers without a head, and a head of the project's own."""

    def build(self):
        config = BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.backbone, self.head = BertModel(config, add_pooling_layer=False), nn.Linear(8, 3)

    def forward(self, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return self.head(self.backbone(**inputs).last_hidden_state[:, 0])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch["labels"])

    def data(self):
        ids = self.classes(30, ROWS, 5)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.classes(3, ROWS)}

    def losses(self, **batch):
        return F.cross_entropy(self(batch), batch["labels"], reduction="none")


PROJECTS = [
    Regression, MultiLabel, OneLogit, Mixup, Segmentation, Detection, MetricLearning, Diffusion, Contrastive,
    Autoencoder, OwnFormula, BackboneAndHead,
]  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """Samples of tensors [N, ...] in a tuple or a mapping."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        if isinstance(self.tensors, dict):
            return {name: tensor[i] for name, tensor in self.tensors.items()}
        return tuple(tensor[i] for tensor in self.tensors)


def fit(module, selection, *callbacks):
    seed_everything(3, verbose=False)
    loader = DataLoader(SampleIds(Rows(module.data())), 16)
    trainer(selection, *callbacks, max_epochs=1).fit(module, loader)


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.__name__)
def test_trains_with_a_selection_and_no_method_of_its_own(project, tmp_path):
    module, twin = project(), project()
    fit(module, HardSampleSelection(keep=0.25), SelectionLedger(tmp_path))
    first = next(Ledger(tmp_path).steps(0))[1]
    assert first["kept"].sum() == 4
    scores = torch.from_numpy(first["score"].copy()).float()
    if project.losses is not None:
        data = Rows(twin.data()).tensors
        with torch.no_grad():
            if isinstance(data, dict):
                wanted = twin.losses(**{name: tensor[:16] for name, tensor in data.items()})
            else:
                wanted = twin.losses(*(tensor[:16] for tensor in data))
        torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=2e-3)  # the ledger holds fp16
    if project is Regression:
        assert [len(x) for x in module.predicted] == [4, 4]  # and not those of the scoring pass


class Manual(Regression):
    def build(self):
        super().build()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.manual_backward(loss)
        self.optimizers().step()


class Named(Manual):
    """A mapping of more fields."""

    def training_step(self, batch, batch_idx):
        super().training_step((batch["x"], batch["y"]), batch_idx)

    def data(self):
        return dict(zip("xy", super().data(), strict=True))


class Largest(OwnFormula):
    """The largest error of a batch is no mean over rows."""

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, y = batch
        return (self(x) - y).abs().max()


@pytest.mark.parametrize("project", [Manual, Named, Largest])
def test_the_error_shows_a_method_that_works_word_for_word(project, tmp_path):
    with pytest.raises(TypeError, match=f"not certain for `{project.__name__}`") as error:
        fit(project(), HardSampleSelection(keep=0.25))
    method = textwrap.dedent(str(error.value).split("\n\n")[1])
    assert len(method.splitlines()) == 4
    names = {"torch": torch}
    exec(method, names)
    fixed = type(project.__name__, (project,), {"score_step": names["score_step"]})
    fit(fixed(), HardSampleSelection(keep=0.25), SelectionLedger(tmp_path))
    assert Ledger(tmp_path).rows()["kept"].to_pylist().count(True) == 8
    assert "float32 [16, 6]" in method


class OtherName(OwnFormula):
    """Lightning takes the index of the batch under any name."""

    def training_step(self, batch, _):
        return super().training_step(batch)


class Broken(OwnFormula):
    def training_step(self, batch, batch_idx):
        return undefined_name  # noqa: F821


class Penalised(OwnFormula):
    """The penalty is a small part of the loss at first, and all of it in the end."""

    def training_step(self, batch):
        x, y = batch
        penalty = sum(p.square().sum() for p in self.parameters())
        return F.mse_loss(self.net(x), y) * 1e-9 ** (self.global_step > 0) + 1e-4 * penalty


class WeightOfAsManyRows(OwnFormula):
    """A penalty on 16 rows of a weight beside a batch of 16."""

    def build(self):
        self.net = nn.Linear(6, 16)

    def training_step(self, batch):
        x, y = batch
        return F.mse_loss(self.net(x)[:, :2], y) + 30 * self.net.weight.square().mean()


def test_a_weight_with_as_many_rows_as_the_batch_is_no_loss_of_rows():
    with pytest.raises(TypeError, match="it does not return a sum of losses of rows"):
        fit(WeightOfAsManyRows(), HardSampleSelection(keep=0.25))


def test_the_index_of_the_batch_has_any_name():
    fit(OtherName(), HardSampleSelection(keep=0.25))


def test_an_error_of_the_step_is_told():
    with pytest.raises(TypeError, match="it raised NameError: name 'undefined_name' is not defined") as error:
        fit(Broken(), HardSampleSelection(keep=0.25))
    assert isinstance(error.value.__cause__, NameError)


def test_a_fit_does_not_end_because_another_term_grows():
    module = Penalised()
    fit(module, HardSampleSelection(keep=0.25))
    assert module.global_step == 2


def test_what_drop_high_leaves_out_is_never_kept():
    with pytest.raises(ValueError, match=r"`drop` must be at most 1 - keep, .* but got 0.3 with keep=0.8"):
        HardSampleSelection(keep=0.8, rule="drop_high")
    HardSampleSelection(keep=0.7, rule="drop_high")


def test_a_rule_that_needs_logits_says_so():
    with pytest.raises(TypeError, match="UtilityDiversitySelection needs logits"):
        fit(Regression(), UtilityDiversitySelection(keep=0.25))
    with pytest.raises(TypeError, match="needs logits"):
        fit(Regression(), HardSampleSelection(keep=0.25, rule="importance", score="grad_norm"))


def test_the_step_draws_no_random_numbers_of_the_fit():
    streams = []

    class Stream(Diffusion):
        def training_step(self, batch, batch_idx):
            if batch_idx >= 0:
                streams.append(torch.get_rng_state())
            return super().training_step(batch, batch_idx)

    for selection in (HardSampleSelection(keep=0.25), HardSampleSelection(keep=1.0)):
        fit(Stream(), selection)
    assert torch.equal(streams[0], streams[2])


def test_every_loss_of_torch_is_known_or_left_to_the_user():
    """A loss that torch has since gained would be missed without a word."""
    from curation.scoring.step_losses import _LOSSES

    names = [name for name in dir(F) if name.endswith("_loss") or "cross_entropy" in name or name == "kl_div"]
    unknown = {name for name in names if getattr(F, name) not in _LOSSES}
    assert unknown <= {"ctc_loss", "linear_cross_entropy"}, unknown
