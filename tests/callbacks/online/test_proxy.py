"""Selection by a small model that is trained beside the large one."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, Proxy, Watch, data, loader, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import TwoRanks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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

    monkeypatch.setattr(proxy_module, "COMPARED_EVERY", 20)
    seed_everything(1, verbose=False)
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


def test_two_ranks_are_killed_and_go_on(ranks, tmp_path):
    whole = ranks.ask(run_of_a_rank, *[(str(tmp_path), False)] * 2)
    resumed = ranks.ask(run_of_a_rank, *[(str(tmp_path), True)] * 2)
    for before, after in zip(whole, resumed, strict=True):
        assert before["rows"][7:] == after["rows"]
        assert before["module"] == after["module"]
        assert before["proxy"] == after["proxy"]
    assert whole[0]["proxy"] == whole[1]["proxy"]
    assert whole[0]["rows"] != whole[1]["rows"]
