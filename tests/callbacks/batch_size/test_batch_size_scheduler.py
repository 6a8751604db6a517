"""Batch sizes by schedule: every step's gradient is that of one large batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from torch.utils.data import DataLoader, TensorDataset

from curation.callbacks import BatchSizeScheduler
from helpers import trainer

ROWS = 4  # of a batch of the loader


class Line(LightningModule):
    """Least squares in fp64, which remembers the gradient and the rows of every step."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.lr = lr
        self.rows, self.steps = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.rows += y.tolist()
        return (x @ self.weight - y).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.steps.append((self.rows, self.weight.detach().clone(), self.weight.grad.clone()))
        self.rows = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ManualLine(Line):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulation = None

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / self.accumulation.size)
        if self.accumulation.ends:
            optimizer.step()
            optimizer.zero_grad()


def points(n):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return TensorDataset(x, torch.arange(n, dtype=torch.float64))


def fit(module, n, *callbacks, epochs=2, ckpt_path=None, **options):
    run = trainer(*callbacks, max_epochs=epochs, **options)
    run.fit(module, DataLoader(points(n), ROWS), ckpt_path=ckpt_path)
    return run


def assert_gradients_of_large_batches(module, n):
    """Against the gradient over all rows of the step at once."""
    x, y = points(n).tensors
    for rows, weight, gradient in module.steps:
        chosen = torch.isin(y, torch.tensor(rows, dtype=y.dtype))
        assert len(rows) == chosen.sum()
        w = weight.clone().requires_grad_()
        (x[chosen] @ w - y[chosen]).square().mean().backward()
        torch.testing.assert_close(gradient, w.grad, rtol=1e-6, atol=1e-6)


changes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7)), max_size=6)


def pairs_of(start, changes):
    pairs = [(0, start * ROWS)]
    for wait, size in changes:
        pairs.append((pairs[-1][0] + wait * ROWS // 2 + 1, size * ROWS))
    return pairs


@pytest.mark.parametrize("line", [Line, ManualLine])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), changes, st.integers(1, 70))
def test_every_gradient_is_that_of_one_large_batch(line, start, changes, n):
    module = line()
    fit(module, n, BatchSizeScheduler(pairs_of(start, changes)))
    assert sum(len(rows) for rows, *_ in module.steps) == 2 * n
    assert_gradients_of_large_batches(module, n)


@pytest.mark.parametrize("batch", range(1, 13))
def test_sizes_may_change_at_every_batch(batch):
    for size in (1, 2, 3, 5, 8):
        for start in (1, 2, 4):
            module = Line()
            scheduler = BatchSizeScheduler([(0, start * ROWS), (batch * ROWS, size * ROWS)])
            fit(module, 13 * ROWS - 1, scheduler)
            assert_gradients_of_large_batches(module, 13 * ROWS - 1)
            assert scheduler.sizes[-1][1] == size * ROWS


class Naive(Callback):
    """Changes the number at once, as is proposed elsewhere."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.accumulate_grad_batches = 2 if batch_idx < 2 else 3


def test_a_change_in_the_middle_of_a_window_has_other_gradients():
    module = Line()
    fit(module, 9 * ROWS, Naive(), epochs=1, accumulate_grad_batches=2)
    with pytest.raises(AssertionError):
        assert_gradients_of_large_batches(module, 9 * ROWS)


def test_lightning_alone_divides_a_short_window_by_its_whole_size():
    module = Line()
    fit(module, 5 * ROWS, epochs=1, accumulate_grad_batches=2)
    with pytest.raises(AssertionError):
        assert_gradients_of_large_batches(module, 5 * ROWS)


def test_a_constant_schedule_of_whole_windows_is_bit_for_bit_that_of_lightning():
    ours, theirs = Line(), Line()
    fit(ours, 12 * ROWS, BatchSizeScheduler([(0, 3 * ROWS)]))
    fit(theirs, 12 * ROWS, accumulate_grad_batches=3)
    assert torch.equal(ours.weight, theirs.weight)
