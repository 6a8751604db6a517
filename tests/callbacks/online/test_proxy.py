"""Selection by a small model that is trained beside the large one."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, Proxy, Watch, assert_same_weights, data, loader, trainer, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from processes import TwoRanks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAUROC

from curation import rng
from curation.callbacks import ExactResume, ProxySelection, RunMeter, SampleRecord
from curation.callbacks.online import proxy as proxy_module


def slow_selection(batches, proxy, keep, update_every, start, reference):
    """The rows to keep of each batch: scored, then trained on by hand."""
    optimizer, kept = torch.optim.SGD(proxy.parameters(), lr=0.1, momentum=0.9), []
    for step, (x, y) in enumerate(batches):
        proxy.eval()
        losses = []
        for i in range(len(x)):
            one = x[i : i + 1], y[i : i + 1]
            loss = F.cross_entropy(proxy.score_step(one)[0], one[1])
            if reference is not None:
                loss = loss - F.cross_entropy(reference.eval().score_step(one)[0], one[1])
            losses.append(float(loss))
        k = min(len(x), max(1, int(keep * len(batches[0][0]) + 0.5)))
        rows = sorted(sorted(range(len(x)), key=lambda i: (-losses[i], i))[:k])
        kept.append(None if step < start * len(batches) else x[rows])
        if step % update_every == 0:
            rng.seed(3, step, 0)
            optimizer.zero_grad()
            F.cross_entropy(proxy.train().score_step((x, y))[0], y).backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * 0.9**step
            optimizer.step()
    return kept


@settings(max_examples=12)
@given(
    keep=st.sampled_from([0.4, 0.5, 0.9]),
    update_every=st.integers(1, 5),
    start=st.sampled_from([0.0, 0.3]),
    referenced=st.booleans(),
    width=st.integers(5, 9),
    batches=st.integers(3, 5),
    last=st.integers(2, 5),
)
def test_kept_rows_are_those_of_a_slow_twin(keep, update_every, start, referenced, width, batches, last):
    size = width * batches + last
    torch.manual_seed(size)
    proxy, twin = Proxy(), Proxy()
    reference = Proxy().requires_grad_(True) if referenced else None
    if reference is not None:
        nn.init.normal_(reference.net[2].weight)
    selection = ProxySelection(keep, proxy, reference, update_every=update_every, start=start, seed=3)
    watch = Watch()
    trainer(selection, watch, max_epochs=1).fit(Classifier(), loader(size, batch_size=width, shuffle=False))
    plain = [tuple(batch) for batch in DataLoader(data(size), width)]
    for got, expected in zip(
        watch.batches, slow_selection(plain, twin, keep, update_every, start, reference), strict=True
    ):
        if expected is not None:
            assert torch.equal(got[0], expected)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(proxy.state_dict()[name], value)


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


def test_parameters_are_not_shared():
    module, proxy = Classifier(), Proxy()
    proxy.net[2] = module.net[4] = nn.Linear(16, CLASSES)
    with pytest.raises(ValueError, match=r"Argument `proxy` must be a module of its own, .* shares parameters"):
        trainer(ProxySelection(0.5, proxy)).fit(module, loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": Proxy(), "rule": "importance"}, "Argument `reference` must be None with `rule='importance'`"),
        ({"reference": 3}, "Argument `reference` must be a LightningModule, but got 3"),
        ({"reference": "none.pt"}, "Argument `irreducible` must name a file, but there is no 'none.pt'"),
    ],
)
def test_a_bad_reference_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(ProxySelection(0.5, Proxy(), **options)).fit(Classifier(), loader())


def test_a_file_of_irreducible_losses_is_a_reference(tmp_path):
    table = torch.linspace(0, 100, 64)
    torch.save(table, tmp_path / "irreducible.pt")
    record = SampleRecord()
    selection = ProxySelection(0.25, Proxy(), str(tmp_path / "irreducible.pt"))
    trainer(selection, record, max_epochs=1).fit(Classifier(), loader())
    assert torch.corrcoef(torch.stack([record.store.scores, table]))[0, 1] < -0.99


def test_a_start_needs_a_length_and_a_level_does_not():
    endless = {"max_epochs": -1, "max_time": "00:00:00:01", "val_check_interval": None}
    with pytest.raises(
        ValueError, match=r"Argument `start` must be 0 in a fit whose length is not known, but got 0.5"
    ):
        trainer(ProxySelection(0.5, Proxy(), start=0.5), **endless).fit(Classifier(), loader())
    selection = ProxySelection(0.5, Proxy(), start_loss=9.0)
    trainer(selection, max_epochs=1).fit(Classifier(), loader())
    assert (selection.started, selection.samples_scored) == (True, 56)  # from the second of eight batches on
    never = ProxySelection(0.5, Proxy(), start_loss=0.0)
    trainer(never, max_epochs=1).fit(Classifier(), loader())
    assert (never.started, never.samples_scored, never.samples_trained) == (False, 0, 32)


def test_after_the_end_rows_are_kept_at_random_again():
    selection = ProxySelection(0.25, Proxy(), start=0.25, end=0.75)
    trainer(selection, max_epochs=1).fit(Classifier(), loader(64 * 10))
    assert selection.samples_scored == 40 * 8
    with pytest.raises(ValueError, match=r"Argument `end` must be more than `start=0.5`, but got 0.5"):
        ProxySelection(0.25, Proxy(), start=0.5, end=0.5)


def test_before_the_start_rows_are_kept_at_random_and_nothing_is_scored():
    proxy, calls = Proxy(), []
    proxy.net.register_forward_hook(lambda *_: calls.append(proxy.training))
    selection = ProxySelection(0.25, proxy, rule="importance", update_every=4, start=0.5)
    trainer(selection, max_epochs=1).fit(Classifier(), loader(64 * 10))
    assert calls.count(False) == 40  # of 80 batches
    assert calls.count(True) == 20
    assert selection.samples_scored == 40 * 8


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


def test_the_task_may_be_any():
    class Regression(Proxy):
        def score_step(self, batch):
            return (self.net(batch[0])[:, 0] - batch[1]).square()

        def training_step(self, batch):
            return self.score_step(batch).mean()

    class Large(Classifier):
        score_step = Regression.score_step

        def training_step(self, batch, batch_idx):
            return self.score_step(batch).mean()

    proxy, watch = Regression(), Watch()
    batches = loader(shuffle=False)
    with torch.no_grad():
        losses = proxy.eval().score_step(next(iter(DataLoader(data(), 8))))
    fit = trainer(ProxySelection(0.5, proxy, update_every=1), watch, max_epochs=1)
    fit.fit(Large(), batches)
    assert torch.equal(watch.batches[0][0], data().tensors[0][:8][losses.topk(4).indices.sort().values])
    assert -1 <= fit.callback_metrics["curation/proxy_rank_correlation"] <= 1


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


def test_a_reference_of_its_own():
    proxy = Proxy()
    with pytest.raises(ValueError, match=r"Argument `reference` must be a module of its own, .* with proxy"):
        trainer(ProxySelection(0.25, proxy, proxy)).fit(Classifier(), loader())


def test_a_module_whose_losses_are_not_known_is_not_compared():
    class Fails(Classifier):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("not in evaluation")
            return super().forward(x)

    fit = trainer(ProxySelection(0.25, Proxy()), max_epochs=1)
    fit.fit(Fails(), loader())
    assert "curation/proxy_rank_correlation" not in fit.callback_metrics


def test_a_proxy_may_skip_a_batch():
    class Skips(Proxy):
        def training_step(self, batch):
            return None

    selection = ProxySelection(0.25, Skips())
    trainer(selection, max_epochs=1).fit(Classifier(), loader())
    assert selection.batches == 8


def test_what_is_logged():
    fit = trainer(ProxySelection(0.5, Proxy()), max_epochs=1)
    module = Classifier()
    fit.fit(module, loader())
    assert {"curation/proxy_loss", "curation/proxy_rank_correlation"} <= fit.callback_metrics.keys()
    assert -1 <= fit.callback_metrics["curation/proxy_rank_correlation"] <= 1
    assert float(fit.callback_metrics["train_loss"]) != float(fit.callback_metrics["curation/proxy_loss"])


def test_a_proxy_that_ranks_otherwise_is_told(monkeypatch):
    class Opposite(Proxy):
        """Unlearns."""

        def training_step(self, batch):
            return -super().training_step(batch)

    monkeypatch.setattr(proxy_module, "COMPARED_EVERY", 5)
    message = "does not rank rows as the model does"
    with pytest.warns(UserWarning, match=message):
        trainer(ProxySelection(0.5, Opposite(), update_every=1), max_epochs=10).fit(Classifier(), loader())
    x = data(640).tensors[0]
    learnable = DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(1)), 64)
    with warnings.catch_warnings(record=True) as caught:
        trainer(ProxySelection(0.5, Proxy(), start=0.5, update_every=1), max_epochs=10).fit(Classifier(), learnable)
    assert not [w for w in caught if message in str(w.message)]


def test_operations_of_the_proxy_are_counted(tmp_path):
    def flops(*callbacks):
        meter = RunMeter(tmp_path / "run.json", count_flops=True)
        trainer(*callbacks, meter, max_epochs=1).fit(Classifier(), loader(), loader(shuffle=False))
        return meter._flops.total

    linear = 2 * FEATURES * CLASSES  # of a row's forward pass
    whole = flops()
    selected = flops(ProxySelection(0.5, Proxy(), update_every=4))
    forward = 8 * 8 * linear
    training = 2 * 8 * 2 * linear  # BatchNorm's weights come before: both gradients
    compared = whole / 3
    assert whole / 2 < selected < whole / 2 + forward + 1.5 * training + compared


@pytest.fixture(scope="module")
def ranks():
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


def run_of_a_rank(given):
    """Two epochs on one of two ranks, saved after seven steps or resumed from there."""
    folder, resume = given
    seed_everything(7, verbose=False)
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    proxy, watch = Proxy(), Watch()
    fit = trainer(ProxySelection(0.5, proxy, update_every=2), ExactResume(), watch, strategy="ddp", devices=2)
    module = Classifier()
    if not resume:
        fit.callbacks.append(ModelCheckpoint(folder, "saved", every_n_train_steps=7))
    fit.fit(module, loader(96), ckpt_path=f"{folder}/saved.ckpt" if resume else None)
    state = {name: value.tolist() for name, value in module.state_dict().items()}
    return {"rows": [b[0].tolist() for b in watch.batches], "module": state, "proxy": repr(proxy.state_dict())}


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


def test_two_ranks_are_killed_and_go_on(ranks, tmp_path):
    whole = ranks.ask(run_of_a_rank, *[(str(tmp_path), False)] * 2)
    resumed = ranks.ask(run_of_a_rank, *[(str(tmp_path), True)] * 2)
    for before, after in zip(whole, resumed, strict=True):
        assert before["rows"][7:] == after["rows"]
        assert before["module"] == after["module"]
        assert before["proxy"] == after["proxy"]
    assert whole[0]["proxy"] == whole[1]["proxy"]
    assert whole[0]["rows"] != whole[1]["rows"]
