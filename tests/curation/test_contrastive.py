"""Large contrastive batches with the memory of small ones: the gradient is that of the full batch."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from processes import on_two_ranks
from torch import nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import curation.contrastive
from curation.contrastive import contrastive_loss, micro_batched, similarity


def towers(dropout=0.0, width=16, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(width), nn.Linear(width, 5))
        for _ in range(2)
    ).to(dtype)


def pairs(n=12, dtype=torch.float64):
    return torch.randn(2, n, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(encode, module, seed=3):
    """Gradients of the loss, with ``encode`` in the place of a plain forward pass."""
    torch.manual_seed(seed)
    module.zero_grad()
    image, text = (encode(tower, x) for tower, x in zip(module, pairs(dtype=module[0][0].weight.dtype), strict=True))
    contrastive_loss(image, text, 10.0).backward()
    return [p.grad.clone() for p in module.parameters()]


def plain(tower, x):
    return tower(x)


@pytest.mark.parametrize("size", [1, 4, 5, 11, 12, 100])
def test_the_gradient_is_that_of_the_full_batch(size):
    module = towers()
    got = gradients(lambda tower, x: micro_batched(tower, x, size), module)
    for a, b in zip(got, gradients(plain, module), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_dropout_draws_the_same_in_the_backward_pass():
    module = towers(dropout=0.5)

    def not_recomputed(tower, x):
        return torch.cat([tower(part) for part in x.split(5)])

    expected = gradients(not_recomputed, module)
    for _ in range(2):
        got = gradients(lambda tower, x: micro_batched(tower, x, 5), module)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert not torch.equal(gradients(not_recomputed, module, seed=4)[0], expected[0])


def test_the_rows_that_are_recomputed_lie_where_the_inputs_do(monkeypatch):
    """Else the random stream of that device would not be restored, and dropout would draw other rows."""
    seen = []

    def checkpoint(function, rows, **kwargs):
        seen.append(rows.device.type)
        return function(rows)

    monkeypatch.setattr(curation.contrastive, "checkpoint", checkpoint)
    micro_batched(lambda batch: batch["x"][0], {"scale": torch.ones(()), "x": (torch.zeros(5, 2, device="meta"),)}, 2)
    assert seen == ["meta"] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_draws_the_same_on_a_gpu():
    module, x = towers(dropout=0.5).cuda()[0], pairs()[0].cuda()
    found = []
    for encode in (lambda: micro_batched(module, x, 5), lambda: torch.cat([module(part) for part in x.split(5)])):
        torch.manual_seed(3)
        module.zero_grad()
        encode().square().sum().backward()
        found.append(module[0].weight.grad.clone())
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_under_autocast_the_gradient_is_that_of_the_full_batch_in_bf16():
    module = towers(dtype=torch.float32)
    types = []

    def micro(tower, x):
        return micro_batched(lambda part: types.append(tower(part).dtype) or tower(part), x, 5)

    with torch.autocast("cpu", torch.bfloat16):
        expected, got = gradients(plain, module), gradients(micro, module)
    exact = gradients(plain, module)
    assert set(types) == {torch.bfloat16}
    assert len(types) == 2 * 3 * 2  # recomputed under autocast too
    for a, b, c in zip(got, expected, exact, strict=True):
        error = (b - c).norm() / c.norm()  # of bf16 itself
        assert error > 1e-4
        assert (a - b).norm() / c.norm() < error


def test_any_nesting_is_split_and_gradients_reach_inputs_and_several_parameters():
    tower = towers()[0]
    x, gain = pairs()[0].requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    sizes = []

    def encode(batch):
        sizes.append(len(batch["mask"]))
        return tower(batch["x"][0] * batch["mask"][:, None]) * gain

    batch = {"x": [x], "mask": torch.arange(12) % 3, "name": list("abcdefghijkl"), "scale": torch.ones(())}
    found = torch.autograd.grad(micro_batched(encode, batch, 5).square().sum(), (x, gain))
    assert sizes == [5, 5, 2, 2, 5, 5]  # the backward pass begins with the last
    for a, b in zip(found, torch.autograd.grad(encode(batch).square().sum(), (x, gain)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_nothing_is_recomputed_without_gradients():
    calls = []
    with torch.no_grad():
        micro_batched(lambda x: calls.append(len(x)) or x, pairs()[0], 5)
    assert calls == [5, 5, 2]


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside that were alive at the same time."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        self.live -= size


def test_memory_is_that_of_one_micro_batch():
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU())]
    tower, x = nn.Sequential(*layers), torch.randn(1024, 64)
    for p in tower.parameters():
        p.grad = torch.zeros_like(p)  # not made inside

    def peak(encode):
        with Peak() as mode:
            encode().square().sum().backward()
        return mode.most

    full, micro = peak(lambda: tower(x)), peak(lambda: micro_batched(tower, x, 32))
    rows = x.numel() * 4  # what one layer makes of the whole batch
    assert full > 16 * rows
    # The embeddings, their gradient and their squares, and 1 / 32 of the activations.
    assert micro < 4 * rows + full / 16


@pytest.mark.parametrize("size", [0, -3])
def test_a_bad_size_is_named(size):
    with pytest.raises(ValueError, match=f"Argument `size` must be an integer >= 1, but got {size}"):
        micro_batched(nn.Identity(), torch.zeros(3, 2), size)


def slow_loss(image, text, scale, positives):
    """The formula, one number at a time."""
    n, total = len(image), 0.0
    s = [[float(scale * (normalize(a, dim=0) @ normalize(b, dim=0))) for b in text] for a in image]
    for rows, mask in ((s, positives), (list(zip(*s, strict=True)), positives.T)):
        for i, row in enumerate(rows):
            partition = sum(torch.tensor(row, dtype=torch.float64).exp().tolist())
            wanted = [row[j] for j in range(n) if mask[i, j]]
            total -= sum(value - float(torch.tensor(partition).log()) for value in wanted) / len(wanted)
    return total / (2 * n)


def test_the_loss_is_the_formula():
    image, text = pairs(7)
    other = torch.eye(7, dtype=torch.bool)
    assert float(contrastive_loss(image, text, 5.0)) == pytest.approx(slow_loss(image, text, 5.0, other), rel=1e-6)
    other[0, 3] = other[3, 0] = other[2, 5] = True
    expected = slow_loss(image, text, 5.0, other)
    assert float(contrastive_loss(image, text, 5.0, other)) == pytest.approx(expected, rel=1e-6)


def test_pairs_alone_are_the_cross_entropies_of_clip():
    image, text = pairs(9)
    logits = 7 * normalize(image, dim=1) @ normalize(text, dim=1).T
    cross = nn.functional.cross_entropy
    expected = (cross(logits, torch.arange(9)) + cross(logits.T, torch.arange(9))) / 2
    torch.testing.assert_close(contrastive_loss(image, text, 7.0), expected)


def test_logits_are_fp32_under_autocast_and_for_bf16_embeddings():
    image, text = pairs(9).to(torch.bfloat16)
    expected = contrastive_loss(image.float(), text.float(), 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(image, text, torch.tensor(50.0))
        assert similarity(image, text).dtype == torch.float32
    assert torch.equal(loss, expected)


def test_shapes_that_do_not_fit_are_named():
    x = torch.zeros(3, 2)
    with pytest.raises(
        ValueError, match=r"Argument `text` must have the shape of `image`.* got \[4, 2\] with \[3, 2\]"
    ):
        contrastive_loss(x, torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match=r"Argument `positives` must have shape \[3, 3\], but got \[3, 1\]"):
        contrastive_loss(x, x, 1.0, torch.ones(3, 1, dtype=torch.bool))


class Pairs(LightningModule):
    """The towers and a temperature, over the batches of all ranks."""

    def __init__(self, folder):
        super().__init__()
        self.towers, self.scale, self.folder = towers(), nn.Parameter(torch.tensor(10.0).double()), folder

    def training_step(self, batch, batch_idx):
        image, text = (
            self.all_gather(micro_batched(tower, x, 4), sync_grads=True).flatten(0, -2)
            for tower, x in zip(self.towers, batch, strict=True)
        )
        assert len(image) == 12
        return contrastive_loss(image, text, self.scale)

    def on_before_optimizer_step(self, optimizer):
        torch.save([p.grad for p in self.parameters()], Path(self.folder) / f"{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, batch_size, **kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = Trainer(accelerator="cpu", precision="64-true", max_steps=1, enable_model_summary=False, **quiet, **kwargs)
    run.fit(Pairs(folder), DataLoader(TensorDataset(*pairs()), batch_size))


def test_the_mean_gradient_of_two_ranks_is_that_of_one_process(tmp_path):
    on_two_ranks(__file__, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    fit(tmp_path, 12)
    for a, b, expected in zip(*found, torch.load(tmp_path / "0.pt"), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, rtol=0, atol=1e-10)


if __name__ == "__main__":
    fit(sys.argv[1], 6, strategy="ddp", devices=2)
