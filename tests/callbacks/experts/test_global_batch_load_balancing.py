"""The gradient of every rule in every kind of run, and what is refused."""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from mixture import EXPERTS, Mixture, Tokens, error, routed, slow_counts, slow_gradients
from processes import on_two_ranks
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, Subset

from curation.callbacks import ExactResume, GlobalBatchLoadBalancing, UniformSelection
from curation.experts import load_balancing as lb

COEFFICIENT = 2.0
RULES = {
    "micro": {"scope": "micro"},
    "rank": {"scope": "rank"},
    "running": {},
    "warm": {"estimator": "warm"},
    "deferred": {"estimator": "deferred"},
    "prepass": {"estimator": "prepass"},
}


def fit(rule="running", module=None, rows=16, ragged=False, callbacks=(), **options):
    """Windows of 4 micro-batches of 2 rows, with weights that stay as they are."""
    module = module or Mixture(lr=0.0)
    callback = GlobalBatchLoadBalancing(COEFFICIENT, **RULES[rule]) if isinstance(rule, str) else rule
    run = trainer(callback, *callbacks, **{"accumulate_grad_batches": 4, "max_epochs": 1, **options})
    run.fit(module, DataLoader(Tokens(rows, 2, ragged), 2), DataLoader(Tokens(4, 2), 2))
    return module, run


def split(rows=16, ragged=False, size=4):
    batches = Tokens(rows, 2, ragged).batches(2)
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def check(module, windows, rule, tolerance=1e-6, size=4):
    """The gradients of a fit are those of its windows."""
    assert len(module.gradients) == len(windows)
    average = None
    for gradients, window in zip(module.gradients, windows, strict=True):
        short = len(window) / size  # Lightning divides a short window by the number of a full one
        expected = slow_gradients(module, [window], COEFFICIENT, rule, average)
        assert error(gradients, {name: g * short for name, g in expected.items()}) < tolerance
        if rule != "micro" and len(window) > 1:
            assert error(expected, slow_gradients(module, [window], COEFFICIENT, "micro")) > 1e-2
        mean = sum(slow_counts(module, batch) for batch in window) / len(window)
        average = mean if average is None else (average + mean) / 2


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_of_a_rule_is_that_of_its_definition(rule, ragged):
    module, _ = fit(rule, ragged=ragged)
    check(module, split(ragged=ragged), rule)


@pytest.mark.parametrize("rule", ["running", "warm", "deferred", "prepass"])
def test_a_short_last_window(rule):
    module, _ = fit(rule, rows=22, ragged=True)
    windows = split(22, True)
    assert [len(window) for window in windows] == [4, 4, 3]
    check(module, windows, rule)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_deferred_gives_a_router_the_gradient_of_one_large_batch_however_it_is_cut(size):
    """With one layer: the correction is for the loss of the router's own layer."""
    module, _ = fit("deferred", Mixture(layers=1, lr=0.0), ragged=True, accumulate_grad_batches=size)
    for gradients, window in zip(module.gradients, split(ragged=True, size=size), strict=True):
        exact, running = (slow_gradients(module, [window], COEFFICIENT, rule) for rule in ("exact", "running"))
        assert error(gradients, exact, ["layers.0.router.weight"]) < 1e-6
        assert size == 1 or error(running, exact, ["layers.0.router.weight"]) > 1e-2


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_pass_before_the_window_gives_all_weights_the_gradient_of_one_large_batch(size):
    supervised = {"supervised": 0.0, "lr": 0.0}
    module, _ = fit("prepass", Mixture(**supervised), ragged=True, accumulate_grad_batches=size)
    for gradients, window in zip(module.gradients, split(ragged=True, size=size), strict=True):
        whole = {name: torch.cat([batch[name] for batch in window]) for name in window[0]}
        assert error(gradients, slow_gradients(Mixture(**supervised), [[whole]], COEFFICIENT, "exact")) < 1e-6


@pytest.mark.parametrize("rule", ["deferred", "prepass"])
def test_a_number_of_micro_batches_that_changes(rule):
    scheduler = GradientAccumulationScheduler({0: 4, 1: 2})
    module, _ = fit(rule, callbacks=[scheduler], max_epochs=2, accumulate_grad_batches=1)
    assert len(module.gradients) == 2 + 4
    first, second = module.gradients[:2], module.gradients[2:]
    module.gradients = first
    check(module, split(), rule)
    module.gradients = second
    check(module, split(size=2), rule, size=2)


class Dropped(Mixture):
    """Dropout, logging, arguments with names of its own, and a batch that is emptied."""

    def forward(self, ids):
        return super().forward(ids) + nn.functional.dropout(torch.zeros(1), 0.5, self.training)

    def training_step(self, popped, i):
        self.log("train_loss", 1.0, on_step=True, on_epoch=True, batch_size=2)
        self.steps = getattr(self, "steps", 0) + torch.is_grad_enabled()
        return self.loss({name: popped.pop(name) for name in ("input_ids", "attention_mask")})


class Unsized(IterableDataset):
    def __iter__(self):
        return iter([Tokens(16, 2)[i] for i in range(16)])


def test_a_pass_before_the_window_leaves_no_trace():
    states = []
    for rule in ("running", "prepass"):
        torch.manual_seed(5)
        module, run = fit(rule, Dropped(lr=0.0))
        assert module.steps == 8
        assert "log" not in vars(module)
        states.append(torch.get_rng_state())
        assert float(run.callback_metrics["train_loss_epoch"]) == 1
    assert torch.equal(*states)


class Emptied(Mixture):
    def training_step(self, popped, i):
        return self.loss({name: popped.pop(name) for name in ("input_ids", "attention_mask")})


def test_a_pass_before_the_window_has_the_mask_of_a_batch_that_its_step_empties():
    module, _ = fit("prepass", Emptied(lr=0.0), ragged=True)
    check(module, split(ragged=True), "prepass")


def test_a_pass_before_the_window_is_refused_where_it_cannot_look_ahead():
    with pytest.raises(ValueError, match="must not be 'prepass' with a data loader that has no length"):
        trainer(GlobalBatchLoadBalancing(estimator="prepass")).fit(Mixture(), DataLoader(Unsized(), 2))
    several = {name: DataLoader(Tokens(16, 2), 2) for name in ("first", "second")}
    with pytest.raises(ValueError, match="must not be 'prepass' with several data loaders"):
        trainer(GlobalBatchLoadBalancing(estimator="prepass")).fit(Mixture(), several)
    with pytest.raises(ValueError, match="must not be 'prepass' where the module optimizes by hand"):
        fit("prepass", Manual(), accumulate_grad_batches=1)
    with pytest.raises(ValueError, match="must not be 'prepass' beside UniformSelection, which changes batches"):
        fit("prepass", callbacks=[UniformSelection(0.5)])


class Manual(Mixture):
    """Steps after every four micro-batches, each of which counts as a fourth."""

    def __init__(self):
        super().__init__(lr=0.0)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch) / 4)
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("rule", ["running", "warm", "deferred"])
def test_manual_optimization(rule):
    callback = GlobalBatchLoadBalancing(COEFFICIENT, **RULES[rule], accumulate=4)
    module, _ = fit(callback, Manual(), ragged=True, accumulate_grad_batches=1)
    check(module, split(ragged=True), rule)


class LoggedByHand(Manual):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        before = loss.detach().clone()
        self.manual_backward(loss)
        assert torch.equal(loss, before)
        self.optimizers().step()
        self.optimizers().zero_grad()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_value_of_a_loss_stays_what_it_is(precision):
    module, _ = fit("deferred", LoggedByHand(), accumulate_grad_batches=1, precision=precision)
    check(module, split(size=1), "deferred", 1e-6 if precision == "32-true" else 0.05, size=1)


class ByHand(Manual):
    def training_step(self, batch, batch_idx):
        self.loss(batch).backward()


def test_a_loss_that_is_differentiated_unseen_is_named():
    with pytest.raises(RuntimeError, match=r"call `self.manual_backward\(loss\)` and not `loss.backward\(\)`"):
        fit("running", ByHand(), accumulate_grad_batches=1)


class TwoOptimizers(Manual):
    """The head steps after every micro-batch, all else after four."""

    def training_step(self, batch, batch_idx):
        head, rest = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        head.step()
        if batch_idx % 4 == 3:
            rest.step()
            rest.zero_grad()
            head.zero_grad()

    def on_before_optimizer_step(self, optimizer):
        if len(optimizer.param_groups[0]["params"]) > 2:
            super().on_before_optimizer_step(optimizer)

    def configure_optimizers(self):
        head = {id(p) for p in self.head.parameters()}
        parts = [[p for p in self.parameters() if (id(p) in head) == first] for first in (True, False)]
        return [torch.optim.SGD(part, lr=0.0) for part in parts]


class Toggled(TwoOptimizers):
    """Each optimizer has its turn, in which the weights of the other are frozen."""

    def training_step(self, batch, batch_idx):
        head, rest = self.optimizers()
        for optimizer in (rest, head):
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch) / 8)
            if optimizer is head or batch_idx % 4 == 3:
                optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_a_step_of_another_optimizer_leaves_the_window_open_while_routers_are_frozen():
    class Sizes(Callback):
        def __init__(self):
            self.sizes = []

        def on_train_batch_end(self, trainer, *_):
            window = trainer.callbacks[0].window
            self.sizes.append((window.size, window.closed))

    sizes = Sizes()
    fit("running", Toggled(), callbacks=[sizes], accumulate_grad_batches=1, rows=8)
    assert sizes.sizes == [(2, False), (4, False), (6, False), (1, False)]


def test_the_window_ends_with_a_step_of_the_routers():
    module, _ = fit(GlobalBatchLoadBalancing(COEFFICIENT, accumulate=4), TwoOptimizers(), accumulate_grad_batches=1)
    check(module, split(), "running")


class Fused(Mixture):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, fused=True)

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.div_(2.0**10)  # as the optimizer will
        super().on_before_optimizer_step(optimizer)


def test_an_optimizer_that_scales_by_itself():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module, _ = fit("deferred", Fused(lr=0.0), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    check(module, split(), "deferred", tolerance=0.02)


def test_routers_that_are_frozen():
    module = Mixture(lr=0.0)
    for layer in module.layers:
        layer.router.requires_grad_(False)
    fit("deferred", module)
    plain = Mixture(lr=0.0)
    fit("running", plain)
    names = [name for name in plain.gradients[0] if "router" not in name]
    assert error(module.gradients[1], plain.gradients[1], names) < 1e-6


@pytest.mark.parametrize("rule", ["running", "deferred", "prepass"])
def test_bf16(rule):
    module, _ = fit(rule, precision="bf16-mixed")
    check(module, split(), rule, tolerance=0.05)


@pytest.mark.parametrize("rule", ["running", "deferred", "prepass"])
def test_a_scaled_loss(rule):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module, _ = fit(rule, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    check(module, split(), rule, tolerance=0.02)


def test_clipping_comes_after_the_correction():
    class Norm(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            if norms:
                self.norm = float(torch.stack(norms).norm())

    norm = Norm()
    fit("deferred", callbacks=[norm], gradient_clip_val=1e-3)
    assert norm.norm == pytest.approx(1e-3, rel=1e-3)


class Checkpointed(Mixture):
    def __init__(self, reentrant):
        super().__init__(lr=0.0)
        self.reentrant = reentrant

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("rule", ["running", "deferred", "prepass"])
def test_activation_checkpointing(rule):
    module, _ = fit(rule, Checkpointed(False))
    check(module, split(), rule)


@pytest.mark.parametrize("rule", ["running", "prepass"])
def test_reentrant_checkpointing_is_refused(rule):
    with pytest.raises(RuntimeError, match=r"No router fired with gradients .* use `use_reentrant=False`"):
        fit(rule, Checkpointed(True))


def test_checkpointing_that_becomes_reentrant_is_refused():
    class Later(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.reentrant = batch_idx > 2

    with pytest.raises(RuntimeError, match=r"No router of Checkpointed fired .* checkpointing reentrant"):
        fit("running", Checkpointed(False), callbacks=[Later()])


def test_a_compiled_model():
    module = Mixture(lr=0.0)
    module.layers = nn.ModuleList(torch.compile(layer, backend="aot_eager") for layer in module.layers)
    callback = GlobalBatchLoadBalancing(COEFFICIENT, routers=r"router$")
    fit(callback, module)
    plain = Mixture(lr=0.0)
    module.gradients = [{n.replace("_orig_mod.", ""): g for n, g in step.items()} for step in module.gradients]
    plain.gradients = module.gradients
    check(plain, split(), "running")


def test_as_many_layers_as_there_are_make_one_graph():
    torch._dynamo.reset()
    counter = CompileCounter()
    module = Mixture(lr=0.0, layers=10)
    module.layers = nn.ModuleList(torch.compile(layer, backend=counter) for layer in module.layers)
    fit(GlobalBatchLoadBalancing(COEFFICIENT, routers=r"router$"), module)
    assert counter.frame_count <= 3  # with gradients, in validation without, and for the first batch of each


class Twice(Mixture):
    """Two forward passes for one loss, each of half the rows."""

    def loss(self, batch):
        halves = [{n: v[i : i + 1] for n, v in batch.items()} for i in (0, 1)]
        share = [h["attention_mask"].sum() / batch["attention_mask"].sum() for h in halves]
        return sum(s * super(Twice, self).loss(h) for s, h in zip(share, halves, strict=True))


def test_several_forward_passes_in_a_step():
    def whole(batch):
        return torch.ones(5, dtype=torch.bool)

    module, _ = fit(GlobalBatchLoadBalancing(COEFFICIENT, mask=whole), Twice(lr=0.0))
    check(module, split(), "running")


def test_validation_in_the_middle_of_a_window_changes_nothing():
    module, _ = fit("warm", val_check_interval=3)
    check(module, split(), "warm")


def test_sequences_z_loss_and_a_fraction_of_the_micro_batch():
    module, _ = fit(GlobalBatchLoadBalancing(1.0, "sequence", micro_fraction=0.3, z_coefficient=0.1), ragged=True)
    (window, _) = split(ragged=True)
    total = 0
    for batch in window:
        total = total + module.loss(batch) / 4
        h = module.embed(batch["input_ids"])
        for layer, (p, chosen, mask) in zip(module.layers, routed(module, batch), strict=True):
            row_losses = []
            for row in range(2):
                at = torch.arange(10) // 5 == row
                f = lb.expert_fractions(lb.expert_counts(chosen[at], EXPERTS, mask[at]))
                row_losses.append(EXPERTS * (f * p[at][mask[at]].mean(0)).sum())
            f = lb.expert_fractions(lb.expert_counts(chosen, EXPERTS, mask))
            micro = EXPERTS * (f * p[mask].mean(0)).sum()
            z = layer.router(h).flatten(0, 1)[mask].logsumexp(-1).square().mean()
            total = total + (0.7 * sum(row_losses) / 2 + 0.3 * micro + 0.1 * z) / 4
            h = layer(h)
    names, parameters = zip(*module.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
    assert error(module.gradients[0], expected) < 1e-5


def test_balance_comes_with_the_loss_and_is_logged():
    loads = []
    for coefficient in (0.0, 1.0):
        module = Mixture(supervised=0.01, lr=0.3)
        module.embed.weight.data[:, 0] = 2
        for layer in module.layers:
            layer.router.weight.data[:2, 0] += 2  # all tokens to two experts
        run = trainer(GlobalBatchLoadBalancing(coefficient), max_epochs=60, accumulate_grad_batches=4)
        run.fit(module, DataLoader(Tokens(16, 2), 2))
        assert {
            "experts/loss",
            "experts/max_load",
            "experts/dead",
            "experts/excess_loss",
        } == run.callback_metrics.keys()
        loads.append(float(run.callback_metrics["experts/max_load"]))
    assert loads[0] > 1.95
    assert 1 <= loads[1] < 1.7


class Biased(nn.Module):
    """A router as in DeepSeek-V3: sigmoids, and a bias for choosing alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 6, generator=torch.Generator().manual_seed(0)))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(EXPERTS))
        self.top_k = 2

    def forward(self, h):
        logits = h.flatten(0, -2) @ self.weight.T
        scores = logits.sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(2, dim=-1).indices
        return logits, scores.gather(1, chosen), chosen


class BiasedMixture(Mixture):
    def __init__(self):
        super().__init__(lr=0.0)
        self.gate = Biased()

    def forward(self, ids):
        h = self.embed(ids)
        _, weights, _ = self.gate(h)
        return self.head(h * weights.sum(-1).view(*h.shape[:2], 1))


def test_a_bias_for_choosing_moves_towards_balance():
    module = BiasedMixture()
    callback = GlobalBatchLoadBalancing(0.0, bias_rate=0.01, routers=r"^gate$")
    run = trainer(callback, max_epochs=1, accumulate_grad_batches=8)
    data = DataLoader(Tokens(16, 2), 2)
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    for batch in data:
        counts += lb.expert_counts(module.gate(module.embed(batch["input_ids"]))[2], EXPERTS)
    run.fit(module, data)
    expected = 0.01 * (counts.float().mean() - counts).sign()
    torch.testing.assert_close(module.gate.e_score_correction_bias, expected)
    with pytest.raises(ValueError, match=r"Argument `bias_rate` must be 0 where no router has a bias, but got 0\.01"):
        fit(GlobalBatchLoadBalancing(bias_rate=0.01))


class Save(Callback):
    def __init__(self, folder, at):
        self.folder, self.at, self.losses = folder, at, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["experts/loss"]))
        if batch_idx == self.at:
            trainer.save_checkpoint(self.folder / "middle.ckpt")


@pytest.mark.parametrize("rule", ["running", "warm", "prepass"])
def test_a_run_resumed_in_the_middle_of_a_window_has_its_counts(tmp_path, rule):
    save = Save(tmp_path, 5)
    fit(rule, callbacks=[ExactResume(), save])
    again = Save(tmp_path, None)
    callback = GlobalBatchLoadBalancing(COEFFICIENT, **RULES[rule])
    run = trainer(callback, ExactResume(), again, accumulate_grad_batches=4, max_epochs=1)
    run.fit(Mixture(lr=0.0), DataLoader(Tokens(16, 2), 2), ckpt_path=tmp_path / "middle.ckpt")
    assert callback.window.size == 4
    assert again.losses == pytest.approx(save.losses[6:], rel=1e-6)


class Drawn(Tokens):
    """Tokens that are drawn as they are asked for."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return {**sample, "input_ids": torch.randint(0, 8, sample["input_ids"].shape)}


@pytest.mark.parametrize("rule", ["running", "prepass"])
@pytest.mark.parametrize("at", [3, 5])
def test_a_resumed_run_draws_the_same_samples_though_some_were_loaded_ahead(tmp_path, rule, at):
    class Rows(Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rows.append(batch["input_ids"].tolist())

    def run(*callbacks, **options):
        rows = Rows()
        balancing = GlobalBatchLoadBalancing(COEFFICIENT, **RULES[rule])
        fitted = trainer(balancing, ExactResume(), rows, *callbacks, accumulate_grad_batches=4, max_epochs=1)
        fitted.fit(Mixture(lr=0.0), DataLoader(Drawn(16, 2), 2), **options)
        return rows.rows

    whole = run(Save(tmp_path, at))
    assert run(ckpt_path=tmp_path / "middle.ckpt") == whole[at + 1 :]


def test_only_exact_gradients_keep_what_routers_are_given():
    kept = []

    class Generates(Mixture):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.loss(batch)
            loss = super().training_step(batch, batch_idx)
            kept.append([inputs is not None for inputs, _ in self.layers[0].router._curation_router_calls])
            return loss

    for rule in ("running", "deferred"):
        fit(rule, Generates(lr=0.0), rows=2)
    assert kept == [[False, False], [False, True]]


def test_nothing_is_left_on_the_routers_after_a_fit():
    module, _ = fit()
    assert not module.layers[0].router._forward_hooks
    assert "_curation_router_calls" not in vars(module.layers[0].router)

    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError

    module = Mixture()
    with pytest.raises(ZeroDivisionError):
        fit("running", module, callbacks=[Fails()])
    assert not module.layers[0].router._forward_hooks


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficient": -1.0}, r"Argument `coefficient` must be in \[0, inf\), but got -1.0"),
        ({"z_coefficient": float("nan")}, r"Argument `z_coefficient` must be in \[0, inf\), but got nan"),
        ({"scope": "batch"}, "Argument `scope` must be 'micro', 'sequence', 'rank' or 'global', but got 'batch'"),
        ({"estimator": "exact"}, "`estimator` must be 'running', 'warm', 'deferred' or 'prepass', but got 'exact'"),
        ({"scope": "micro", "estimator": "warm"}, "Argument `estimator` must be 'running' with the scope 'micro'"),
        ({"coefficient": "x"}, r"Argument `coefficient` must be in \[0, inf\), but got 'x'"),
        ({"bias_rate": True}, r"Argument `bias_rate` must be in \[0, inf\), but got True"),
        ({"accumulate": 2.0}, "Argument `accumulate` must be an integer >= 1, but got 2.0"),
        ({"routers": None}, "Argument `routers` must be a string, but got None"),
        ({"mask": 1}, "Argument `mask` must be a string or None, but got 1"),
        ({"estimator": 1}, "Argument `estimator` must be 'running', 'warm', 'deferred' or 'prepass', but got 1"),
        ({"buffer": "exact"}, "Argument `buffer` must be 'running', .* but got 'exact'"),
        (
            {"estimator": "warm", "buffer": "prepass"},
            "Argument `buffer` must be None .* got 'prepass' and 'warm'",
        ),
        ({"micro_fraction": 1.5}, r"Argument `micro_fraction` must be in \[0, 1\], but got 1.5"),
        ({"top_k": 0}, "Argument `top_k` must be an integer >= 1 or None, but got 0"),
        (
            {"scores": "relu"},
            "Argument `scores` must be 'auto', 'softmax', 'sigmoid' or 'sqrtsoftplus', but got 'relu'",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchLoadBalancing(**arguments)


def test_the_old_name_of_the_estimator_is_understood():
    assert GlobalBatchLoadBalancing(buffer="warm").estimator == "warm"
    assert GlobalBatchLoadBalancing(estimator="warm", buffer="warm").estimator == "warm"


def test_arguments_that_do_not_fit_the_model_are_named():
    with pytest.raises(ValueError, match="Argument `routers` must name the routers of Mixture, but 'nothing' finds"):
        fit(GlobalBatchLoadBalancing(routers="nothing"))
    with pytest.raises(ValueError, match=r"Argument `mask` must give one value for each token, but it gives \[3\]"):
        fit(GlobalBatchLoadBalancing(mask=lambda batch: torch.ones(3)))
    with pytest.raises(ValueError, match=r"Argument `mask` must give \[B, T\] with the scope 'sequence'"):
        fit(GlobalBatchLoadBalancing(scope="sequence", mask=None))
    module = Mixture()
    for layer in module.layers:
        del layer.top_k
    with pytest.raises(ValueError, match=r"Argument `top_k` must be given: the router layers\.0\.router"):
        fit("running", module)


def test_a_model_that_never_runs_its_routers_is_named():
    class Silent(Mixture):
        def forward(self, ids):
            return self.head(self.embed(ids))

    with pytest.raises(RuntimeError, match=r"No router of Silent fired .* Does `training_step` run them"):
        fit("running", Silent())


def test_a_model_with_a_loss_of_its_own_is_refused():
    transformers = pytest.importorskip("transformers")
    module = Mixture()
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**sizes, output_router_logits=True)
    module.model = transformers.MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="MixtralForCausalLM adds a load-balancing loss itself"):
        fit("running", module)


class Probabilities(nn.Linear):
    def forward(self, h):
        return super().forward(h).softmax(-1)


def test_a_router_that_puts_out_probabilities_is_not_normalised_again():
    module, plain = Mixture(lr=0.0, supervised=0.0), Mixture(lr=0.0, supervised=0.0)
    for layer, other in zip(module.layers, plain.layers, strict=True):
        weight = layer.router.weight
        layer.router = Probabilities(6, EXPERTS, bias=False)
        layer.router.weight.data.copy_(weight)
        other.router.weight.data.copy_(weight)
        layer.forward = lambda h, layer=layer: h + layer.router(h).sum(-1, keepdim=True)
        other.forward = lambda h, layer=other: h + layer.router(h).softmax(-1).sum(-1, keepdim=True)
    fit("micro", module)
    fit("micro", plain)
    assert error(module.gradients[0], plain.gradients[0]) < 1e-5


# ---------------------------------------------------------------------- two processes


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for rule in RULES:
        for size in (1, 4):
            module = Mixture(lr=0.0)
            run = trainer(
                GlobalBatchLoadBalancing(COEFFICIENT, **RULES[rule]), devices=2, strategy="ddp", max_epochs=1,
                accumulate_grad_batches=size, use_distributed_sampler=False,
            )  # fmt: skip
            batches = torch.arange(16).view(8, 2)[rank::2].flatten()
            run.fit(module, DataLoader(Subset(Tokens(16, 2, True), batches.tolist()), 2))
            torch.save(module.gradients, Path(folder, f"{rule}-{size}-{rank}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(__file__, folder)
    return folder


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_with_unequal_tokens(ranks, rule, size):
    first, second = (torch.load(ranks / f"{rule}-{size}-{rank}.pt") for rank in (0, 1))
    batches, module, average = Tokens(16, 2, True).batches(2), Mixture(lr=0.0), None
    assert len(first) == len(second) == 4 // size
    for step, (gradients, same) in enumerate(zip(first, second, strict=True)):
        window = [batches[rank::2][size * step : size * (step + 1)] for rank in (0, 1)]
        expected = slow_gradients(module, window, COEFFICIENT, rule, average)
        assert error(gradients, expected) < 1e-6
        assert error(same, gradients) == 0
        mean = sum(slow_counts(module, batch) for rank in window for batch in rank) / size
        average = mean if average is None else (average + mean) / 2


@pytest.mark.parametrize("rule", RULES)
def test_padding_may_be_no_number(rule):
    class Padded(Mixture):
        def __init__(self, value):  # the only router gives padding, whose embedding is 0, this logit for every expert
            super().__init__(layers=1, lr=0.0)
            self.embed.register_forward_hook(lambda _, args, out: out * self.counted[..., None])
            self.layers[0].router.register_forward_hook(
                lambda _, args, out: out.masked_fill(args[0].eq(0).all(-1, keepdim=True), value)
            )

        def loss(self, batch):
            self.counted = batch["attention_mask"]
            return 0 * self(batch["input_ids"])[self.counted.bool()].sum()

    zeros, infinite = (fit(rule, Padded(value), rows=8, ragged=True) for value in (0.0, -torch.inf))
    gradients = [module.gradients[0]["layers.0.router.weight"] for module, _ in (zeros, infinite)]
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])
    for name in ("experts/loss", "experts/excess_loss"):
        assert float(infinite[1].callback_metrics[name]) == pytest.approx(float(zeros[1].callback_metrics[name]))


if __name__ == "__main__":
    main(sys.argv[1])
