"""Least squares in fp64, whose gradient over any rows can be told, and data loaders for it."""

import torch
from helpers import trainer
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

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


class SingleLine(Line):
    """In the precision of the fit, with weights in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(self.weight.detach().float())

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.rows += y.tolist()
        return ((x.float() @ self.weight[:, None])[:, 0].float() - y.float()).square().mean()


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
