"""Log-probabilities in chunks against ``log_softmax`` of all logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from curation.log_probs import token_entropy, token_log_probs


def naive(hidden, weight, targets, bias=None, temperature=1.0):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(targets.ne(-100), 0)


def inputs(*shape, V=11, d=5, seed=0, dtype=torch.float64, bias=True, ignored=0.2):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, d, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, d, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(V, shape, generator=g)
    targets[torch.rand(shape, generator=g) < ignored] = -100
    return hidden, weight, targets, torch.randn(V, generator=g, dtype=dtype).requires_grad_() if bias else None


def gradients(value, *leaves, seed=1):
    """Of a weighted sum of the values."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(value.shape, generator=g, dtype=torch.float64).to(value)
    return torch.autograd.grad((value * weights).sum(), leaves)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(), (1,), (7,), (3, 4), (2, 0), (2, 3, 2)]),
    chunk=st.integers(1, 13),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_values_and_all_gradients_are_those_of_log_softmax(shape, chunk, temperature, bias, ignored, seed):
    hidden, weight, targets, b = inputs(*shape, bias=bias, ignored=ignored, seed=seed)
    leaves = [hidden, weight] + [b] * bias
    value = token_log_probs(hidden, weight, targets, b, temperature, chunk)
    wanted = naive(hidden, weight, targets, b, temperature)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients(value, *leaves), gradients(wanted, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_numerical_gradients():
    hidden, weight, targets, bias = inputs(6)
    torch.autograd.gradcheck(lambda h, w, b: token_log_probs(h, w, targets, b, 0.7, 4), (hidden, weight, bias))


@pytest.mark.parametrize("tokens", [3, 4, 5, 8])
def test_chunks_that_fit_or_do_not_change_nothing(tokens):
    hidden, weight, targets, bias = inputs(tokens)
    whole, parts = (token_log_probs(hidden, weight, targets, bias, chunk=size) for size in (100, 4))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients(parts, hidden, weight), gradients(whole, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_token_that_is_not_scored_gives_zero_and_no_gradient():
    hidden, weight, targets, _ = inputs(6, ignored=0)
    targets[2] = -100
    value = token_log_probs(hidden, weight, targets)
    (of_hidden,) = gradients(value, hidden)
    assert value[2] == 0
    assert value.ne(0).sum() == 5
    assert not of_hidden[2].any()
    assert of_hidden.any(1).sum() == 5


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed_are_made(trained):
    leaves = [t.detach().requires_grad_(on) for t, on in zip(inputs(6)[:2] + inputs(6)[3:], trained, strict=True)]
    targets = inputs(6)[2]
    token_log_probs(leaves[0], leaves[1], targets, leaves[2]).sum().backward()
    assert tuple(t.grad is not None for t in leaves) == trained
    wanted = [t.detach().requires_grad_(on) for t, on in zip(leaves, trained, strict=True)]
    naive(wanted[0], wanted[1], targets, wanted[2]).sum().backward()
    i = trained.index(True)
    torch.testing.assert_close(leaves[i].grad, wanted[i].grad, rtol=0, atol=1e-12)


def test_hidden_states_and_heads_that_are_not_contiguous():
    hidden, weight, targets, _ = inputs(4, 3)
    values = [
        token_log_probs(h, w, targets, chunk=5) for h, w in ((hidden.mT.contiguous().mT, weight), (hidden, weight))
    ]
    strided = torch.stack([weight, weight], -1)[..., 0]
    values.append(token_log_probs(hidden.transpose(0, 1).contiguous().transpose(0, 1), strided, targets, chunk=5))
    for value in values:
        torch.testing.assert_close(value, naive(hidden, weight, targets), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            gradients(value, hidden, weight), gradients(naive(hidden, weight, targets), hidden, weight)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_its_inputs(dtype):
    hidden, weight, targets, bias = inputs(40, V=300, d=64, dtype=dtype)
    value = token_log_probs(hidden, weight, targets, bias, chunk=16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    wanted = naive(exact[0], exact[1], targets, exact[2])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(value, hidden, weight, bias), gradients(wanted, *exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), theirs, rtol=2 ** (-8 if dtype == torch.bfloat16 else -10), atol=1e-4
        )


def test_under_autocast_the_head_is_trained_in_its_own_dtype():
    hidden, weight, targets, _ = inputs(20, V=50, d=16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = torch.nn.Linear(16, 16)
        value = token_log_probs(layer(hidden), weight, targets, chunk=8)
        entropy = token_entropy(layer(hidden), weight)
        assert layer(hidden).dtype == torch.bfloat16
    wanted = naive(layer(hidden), weight, targets)
    assert value.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=0.02, atol=0.05)
    ours, theirs = (gradients(v, weight, layer.weight) for v in (value, wanted))
    assert [g.dtype for g in ours] == 2 * [torch.float32]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9995


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in made)])
        return out


@pytest.mark.parametrize("tokens", [8, 64, 512])
def test_the_largest_tensor_does_not_grow_with_the_tokens(tokens):
    hidden, weight, targets, bias = inputs(tokens, V=1000, d=2, dtype=torch.float32)
    with Largest() as largest:
        token_log_probs(hidden, weight, targets, bias, chunk=8).sum().backward()
        token_entropy(hidden, weight, bias, chunk=8)
    assert largest.numel == 8 * 1000
    with Largest() as largest:
        naive(hidden, weight, targets).sum().backward()
    assert largest.numel == tokens * 1000


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_entropy_is_that_of_the_softmax_and_has_no_gradient(temperature):
    hidden, weight, _, bias = inputs(3, 4)
    found = token_entropy(hidden, weight, bias, temperature, chunk=5)
    wanted = torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / temperature).entropy()
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-12)
    assert not found.requires_grad


def test_entropy_of_tokens_that_a_bias_rules_out():
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    torch.testing.assert_close(token_entropy(torch.zeros(1, 2), torch.ones(3, 2), bias), torch.tensor([2.0]).log())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(4, 5, dtype=torch.int64)},
            r"`hidden` must be floating \[..., d\], but got torch.int64",
        ),
        ({"hidden": torch.tensor(1.0)}, r"`hidden` must be floating .* \[\]"),
        ({"weight": torch.zeros(11, 4)}, r"`weight` must be \[V, 5\], but got \[11, 4\]"),
        ({"weight": torch.zeros(5)}, r"`weight` must be \[V, 5\], but got \[5\]"),
        ({"bias": torch.zeros(5)}, r"`bias` must be \[11\], but got \[5\]"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"`targets` must be int64 \[4\], but got torch.int64 \[3\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, r"`targets` must be int64 \[4\], but got torch.int32 \[4\]"),
        ({"temperature": 0.0}, r"`temperature` must be in \(0, inf\), but got 0.0"),
        ({"temperature": float("nan")}, r"`temperature` must be in \(0, inf\), but got nan"),
        ({"chunk": 0}, "`chunk` must be an integer >= 1, but got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, targets, bias = inputs(4)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        token_log_probs(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_with_no_wait(dtype):
    hidden, weight, targets, bias = (t.detach().cuda() for t in inputs(200, V=1000, d=64, dtype=dtype))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = token_log_probs(hidden, weight, targets, bias, chunk=64)
        found = torch.autograd.grad(value.sum(), leaves)
        token_entropy(hidden, weight, bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = naive(exact[0], exact[1], targets, exact[2])
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(found, torch.autograd.grad(wanted.sum(), exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=2e-3)
