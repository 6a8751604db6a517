"""The proxy's own training inside the fit of the large model: what is called, kept, averaged and saved."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, Proxy, assert_same_weights, data, loader, trainer, weights
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from processes import TwoRanks
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAUROC

from curation.callbacks import ExactResume, ProxySelection


class NoLoss(LightningModule):
    def configure_optimizers(self):
        return None


class NoOptimizer(Proxy):
    configure_optimizers = LightningModule.configure_optimizers


class ReturnsNoOptimizer(Proxy):
    def configure_optimizers(self):
        return None


class Manual(Proxy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Proxy):
    def configure_optimizers(self):
        return [torch.optim.SGD([self.waves], lr=0.1), torch.optim.SGD(self.net.parameters(), lr=0.1)]


class Plateau(Proxy):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class TwoSchedules(Proxy):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, n) for n in (1, 2)]


class Empty(Proxy):
    def configure_optimizers(self):
        return []


class Fetches(Proxy):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter))


class ReturnsText(Proxy):
    def training_step(self, batch):
        return "loss"


class Large(Proxy):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(99, 99)


class TwoClasses(Proxy):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(FEATURES, 2)


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        (NoLoss, "Argument `proxy` must be a module that is trained, but NoLoss has no `training_step`"),
        (NoOptimizer, "but NoOptimizer has no `configure_optimizers`"),
        (ReturnsNoOptimizer, "Argument `proxy` must be a module with one optimizer, but .* gives none"),
        (Manual, "Argument `proxy` must be optimized automatically, but Manual does so by itself"),
        (TwoOptimizers, "Argument `proxy` must be a module with one optimizer, but .* gives several"),
        (TwoSchedules, "Argument `proxy` must be a module with one schedule at most, but it has several"),
        (Empty, "Argument `proxy` must be a module with one optimizer, but .* gives none"),
        (Plateau, "Argument `proxy` must not have a schedule that waits for a metric"),
        (Fetches, r"`Fetches.training_step\(dataloader_iter\)` fetches its own batches"),
        (ReturnsText, "Argument `proxy` .* returns its loss, but that of ReturnsText returned str"),
        (
            Large,
            "Argument `proxy` must be smaller than the module, but Large has 9,960 parameters and Classifier 244",
        ),
        (TwoClasses, "2 logits came with a target"),
        (nn.Identity, "Argument `proxy` must be a LightningModule, but got Identity"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.*")
def test_what_is_no_proxy_is_refused(proxy, message):
    module = Classifier()
    before = weights(module)
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(ProxySelection(0.5, proxy())).fit(module, loader())
    if proxy is not ReturnsText:  # which shows after a step
        assert_same_weights(before, weights(module))


class Sees(Proxy):
    """Remembers what its steps see of the fit."""

    def __init__(self):
        super().__init__()
        self.steps, self.rates, self.dtypes = [], [], []

    def setup(self, stage):
        self.stage = stage

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.steps.append(self.trainer.global_step)
        self.dtypes.append(self.net(batch[0]).dtype)
        return loss

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        optimizer.register_step_pre_hook(lambda *_: self.rates.append(optimizer.param_groups[0]["lr"]))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_a_schedule_of_the_proxy_ends_with_the_fit():
    proxy = Sees()
    fit = trainer(ProxySelection(0.25, proxy, update_every=2), max_epochs=2, accumulate_grad_batches=2)
    fit.fit(Classifier(), loader())
    assert proxy.stage == "fit"
    assert proxy.rates == [1 - step / 8 for step in range(8)]  # of 16 batches and 8 steps
    assert proxy.steps == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_schedule_of_epochs():
    class ByEpoch(Proxy):
        def configure_optimizers(self):
            self.optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [self.optimizer], [torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)]

    proxy = ByEpoch()
    trainer(ProxySelection(0.25, proxy), max_epochs=3).fit(Classifier(), loader())
    assert proxy.optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"precision": "bf16-mixed"}, torch.bfloat16),
        ({"precision": "bf16-true"}, torch.bfloat16),
        ({"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}, torch.float32),
        ({"precision": "64-true"}, torch.float64),
    ],
    ids=["bf16-mixed", "bf16-true", "16-mixed", "64-true"],
)
def test_the_proxy_has_the_precision_of_the_fit(options, dtype):
    proxy = Sees()
    trainer(ProxySelection(0.25, proxy), max_epochs=1, **options).fit(Classifier(), loader())
    assert set(proxy.dtypes) == {dtype}
    assert all(p.isfinite().all() for p in proxy.parameters())


def test_gradients_are_clipped_as_those_of_the_module():
    proxy = Sees()
    before = weights(proxy)
    trainer(ProxySelection(0.25, proxy, update_every=100), max_epochs=1, gradient_clip_val=1e-3).fit(
        Classifier(), loader()
    )
    moved = torch.cat([(value - before[name]).flatten() for name, value in proxy.named_parameters()])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_schedule_of_epochs_is_saved_at_the_last_batch_as_lightnings_own(tmp_path):
    """Lightning steps such a schedule before the hooks of the last batch, in which checkpoints are saved."""

    class ByEpoch(Proxy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def run(resume=None):
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
        selection = ProxySelection(0.25, ByEpoch())
        options = {"max_epochs": 3, "enable_checkpointing": True, "default_root_dir": tmp_path}
        trainer(selection, ExactResume(), save, **options).fit(Classifier(), loader(), ckpt_path=resume)
        return selection.training.optimizer.param_groups[0]["lr"], weights(selection.proxy)

    (rate, whole), (other, resumed) = run(), run(tmp_path / "step=8.ckpt")
    assert rate == other == 0.125
    assert_same_weights(whole, resumed)


def test_a_checkpoint_before_a_resumed_fit_begins_loses_nothing(tmp_path):
    class Saves(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    first = trainer(ProxySelection(0.25, Proxy()), max_epochs=1)
    first.fit(Classifier(), loader())
    first.save_checkpoint(tmp_path / "end.ckpt")
    again = trainer(ProxySelection(0.25, Proxy()), Saves(), max_epochs=2)
    again.fit(Classifier(), loader(), ckpt_path=tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "early.ckpt")["callbacks"]["ProxySelection"]["proxy"]
    assert saved["windows"] == 8
    assert saved["optimizer"]["state"]


def test_frozen_parts_of_the_proxy_stay_as_they_are_and_metrics_do_not_grow():
    class Frozen(Proxy):
        def __init__(self):
            super().__init__()
            self.net[0].eval().requires_grad_(False)
            self.area = MulticlassAUROC(CLASSES)

        def training_step(self, batch):
            logits, targets = self.score_step(batch)
            self.area.update(logits.detach(), targets)
            return F.cross_entropy(logits, targets)

    proxy = Frozen()
    before = weights(proxy.net[0])
    trainer(ProxySelection(0.25, proxy), max_epochs=1).fit(Classifier(), loader())
    assert not proxy.net[0].training
    assert_same_weights(before, weights(proxy.net[0]))
    assert not proxy.area.preds


def test_what_the_proxy_draws_before_training_leaves_the_fit_alone():
    class Draws(Proxy):
        def setup(self, stage):
            torch.rand(3)

        def configure_optimizers(self):
            torch.rand(3)
            return super().configure_optimizers()

    class Module(Classifier):
        def configure_model(self):
            self.drawn = float(torch.rand(()))

    modules = [Module(), Module()]
    for module, selection in zip(modules, ([], [ProxySelection(0.25, Draws())]), strict=True):
        seed_everything(3, verbose=False)
        trainer(*selection, max_epochs=1).fit(module, loader(ids=False))
    assert modules[0].drawn == modules[1].drawn


def test_lazy_parameters_have_no_size_yet():
    class Lazy(Proxy):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(CLASSES))

    class LazyLarge(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(CLASSES))

    selection = ProxySelection(0.25, Lazy())
    batch = next(iter(DataLoader(data(), 8)))
    selection.proxy.score_step(batch)
    large = LazyLarge()
    large(batch[0])
    trainer(selection, max_epochs=1).fit(large, loader())
    assert selection.batches == 8


def test_a_proxy_may_skip_a_batch():
    class Skips(Proxy):
        def training_step(self, batch):
            return None

    selection = ProxySelection(0.25, Skips())
    trainer(selection, max_epochs=1).fit(Classifier(), loader())
    assert selection.batches == 8


@pytest.fixture(scope="module")
def ranks():
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


class UsedByRankZero(Proxy):
    """A layer that one process leaves out, and a buffer at the edge of its type, as of additive masks."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(FEATURES, 2)
        self.register_buffer("lowest", torch.tensor(torch.finfo(torch.float32).min))

    def training_step(self, batch):
        loss = super().training_step(batch)
        return loss + self.more(batch[0]).square().mean() if torch.distributed.get_rank() == 0 else loss


def proxy_of_a_rank(_):
    proxy = UsedByRankZero()
    torch.manual_seed(0)
    trainer(ProxySelection(0.5, proxy), strategy="ddp", devices=2, max_epochs=1).fit(Classifier(), loader())
    return {name: value.tolist() for name, value in proxy.state_dict().items()}


def test_what_one_rank_does_not_use_is_averaged_too(ranks):
    one, other = ranks.ask(proxy_of_a_rank, 0, 0)
    assert one == other
    assert one["lowest"] == torch.finfo(torch.float32).min
