"""Nuclear norms without an SVD, against the SVD, and their trend with length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from twins import slow_length_trend

from curation.online.nuclear_norm import (
    gram_of_head,
    nuclear_norm,
    nuclear_norm_from_hidden,
    root_of,
    sum_of_singular_values,
)
from curation.online.utility_diversity import LengthTrend, UtilityDiversityScorer, utility_diversity


def slow_nuclear_norm(logits, mask=None):
    """The definition, sample by sample, in fp64."""
    mask = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask
    return torch.stack([torch.linalg.svdvals(x[m].double()).sum() for x, m in zip(logits, mask, strict=True)])


def case(T, d, V, seed=0, B=3):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, d, generator=g)
    weight = torch.randn(V, d, generator=g) / d**0.5
    mask = torch.rand(B, T, generator=g) < 0.6
    mask[:, 0] = True
    return hidden, weight, mask


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.integers(1, 16), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_both_routes_equal_the_svd(T, d, V, seed, masked):
    hidden, weight, mask = case(T, d, V, seed)
    mask = mask if masked else None
    logits = hidden @ weight.T
    expected = slow_nuclear_norm(hidden.double() @ weight.double().T, mask)
    torch.testing.assert_close(nuclear_norm(logits, mask).double(), expected, rtol=1e-3, atol=1e-3)
    exact = nuclear_norm(hidden.double() @ weight.double().T, mask)
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-5)
    from_hidden = nuclear_norm_from_hidden(hidden, gram_of_head(weight, dtype=torch.float64), mask)
    torch.testing.assert_close(from_hidden, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("T", "d"), [(128, 64), (64, 64), (48, 64)])
def test_precision_of_both_routes_on_full_rank(T, d):
    hidden, weight, _ = case(T, d, 2000)
    expected = slow_nuclear_norm(hidden.double() @ weight.double().T)

    def error(got):
        return (got.double() / expected - 1).abs().max().item()

    assert error(nuclear_norm_from_hidden(hidden, gram_of_head(weight))) < 1e-4
    assert error(nuclear_norm_from_hidden(hidden, gram_of_head(weight, dtype=torch.float64))) < 1e-5
    if d >= T:
        assert error(nuclear_norm(hidden @ weight.T)) < 1e-5


def test_repeated_tokens_do_not_add_rounding_noise():
    hidden, weight, _ = case(6, 64, 2000)
    hidden = hidden.repeat_interleave(40, dim=1)  # 240 tokens of rank 6
    expected = slow_nuclear_norm(hidden.double() @ weight.double().T)
    got = nuclear_norm_from_hidden(hidden, gram_of_head(weight, dtype=torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(nuclear_norm(hidden @ weight.T).double(), expected, rtol=1e-3, atol=0)


def test_bias_is_a_column_of_ones():
    hidden, weight, _ = case(9, 8, 50)
    bias = torch.randn(50)
    extended = torch.cat([hidden, torch.ones(3, 9, 1)], dim=-1)
    expected = slow_nuclear_norm((hidden @ weight.T + bias).double())
    got = nuclear_norm_from_hidden(extended, gram_of_head(weight, bias, torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_gram_over_slices_equals_the_product():
    weight = torch.randn(20_000, 5, dtype=torch.float64)
    torch.testing.assert_close(gram_of_head(weight, dtype=torch.float64), weight.T @ weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_accumulated_in_fp32(dtype):
    hidden, weight, mask = case(20, 16, 300)
    logits = (hidden @ weight.T).to(dtype)
    got = nuclear_norm(logits, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), slow_nuclear_norm(logits, mask), rtol=1e-3, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.floats(0, 3), st.integers(0, 10**6))
def test_products_alone_give_the_singular_values_too(n, d, rank, decay, seed):
    g = torch.Generator().manual_seed(seed)
    scales = 10.0 ** (-decay * torch.arange(rank, dtype=torch.float64) / rank)
    m = torch.randn(3, n, rank, generator=g, dtype=torch.float64) * scales
    m = m @ torch.randn(3, rank, d, generator=g, dtype=torch.float64)
    expected = torch.linalg.svdvals(m).sum(1)
    torch.testing.assert_close(sum_of_singular_values(m), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(sum_of_singular_values(m.float()).double(), expected, rtol=1e-5, atol=0)


class TensorFloat32(TorchDispatchMode):
    """Rounds the factors of products to ten bits where fp32 products need not be precise, as GPUs do."""

    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        product = function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
        if product and torch.get_float32_matmul_precision() == "high":
            self.products += 1
            args = [*args[:-2], *map(self.rounded, args[-2:])]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def rounded(factor):
        return ((factor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("n", [8, 64, 200])
@pytest.mark.parametrize("decay", [0.1, 1.0, 2.0])
def test_most_products_of_the_norm_may_be_in_tf32(n, decay):
    g = torch.Generator().manual_seed(n)
    m = torch.randn(4, n, 256, generator=g, dtype=torch.float64)
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    s = (torch.arange(n) + 1.0).double() ** -decay
    m = u * s @ v
    with TensorFloat32() as mode:
        got = sum_of_singular_values(m.float())
    assert mode.products == 28
    torch.testing.assert_close(got.double(), s.sum().expand(4), rtol=1e-5, atol=0)
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_alone_by_the_head_and_what_is_not_finite():
    hidden, weight, _ = case(40, 24, 300)
    weight[:, 0] *= 1000
    weight[:, 1] = weight[:, 2]  # indefinite but for the shift
    gram = gram_of_head(weight, dtype=torch.float64)
    expected = slow_nuclear_norm(hidden.double() @ weight.double().T)
    got = sum_of_singular_values(hidden @ root_of(gram))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    hidden[0] = 0
    hidden[1, 3, 3] = torch.nan
    hidden[2, 3, 3] = torch.inf
    assert [str(v) for v in sum_of_singular_values(hidden @ root_of(gram)).tolist()] == ["0.0", "nan", "nan"]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_products_alone_at_extreme_scales(scale):
    m = torch.diag(torch.tensor([3.0, 4.0]))[None] * scale
    torch.testing.assert_close(sum_of_singular_values(m), torch.tensor([7 * scale]), rtol=1e-5, atol=0)


def test_the_root_of_a_product_that_rounding_made_indefinite():
    weight = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -5, 24)
    gram = gram_of_head(weight) - 1e-6 * torch.eye(24)
    root = root_of(gram)
    assert torch.linalg.eigvalsh(gram.double()).min() < 0
    torch.testing.assert_close(root @ root.T, gram, rtol=0, atol=1e-4)
    gram[0, 0] = torch.nan
    assert root_of(gram).isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("T", "d"), [(1, 16), (64, 24), (48, 64)])
def test_both_routes_on_a_gpu(T, d):
    hidden, weight, mask = (part.cuda() for part in case(T, d, 500))
    expected = slow_nuclear_norm(hidden.double() @ weight.double().T, mask)
    got = nuclear_norm(hidden @ weight.T, mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    got = nuclear_norm_from_hidden(hidden, gram_of_head(weight, dtype=torch.float64), mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_padding_changes_nothing_whatever_it_holds():
    hidden, weight, mask = case(16, 24, 90)
    padded = torch.cat([hidden, torch.full_like(hidden, torch.nan)], dim=1)
    longer = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    gram = gram_of_head(weight, dtype=torch.float64)
    assert torch.equal(nuclear_norm_from_hidden(padded, gram, longer), nuclear_norm_from_hidden(hidden, gram, mask))
    logits = hidden @ weight.T
    padded = torch.cat([logits, torch.full_like(logits, torch.inf)], dim=1)
    assert torch.equal(nuclear_norm(padded, longer), nuclear_norm(logits, mask))


def test_one_position_gives_the_euclidean_norm_and_none_gives_zero():
    logits = torch.randn(4, 1, 10)
    torch.testing.assert_close(nuclear_norm(logits), logits[:, 0].norm(dim=1))
    assert nuclear_norm(logits, torch.zeros(4, 1, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


def test_what_is_not_finite_gives_nan_for_its_sample_only():
    hidden, weight, _ = case(6, 8, 30)
    hidden[1, 2, 3] = torch.nan
    gram = gram_of_head(weight)
    assert nuclear_norm_from_hidden(hidden, gram).isnan().tolist() == [False, True, False]
    logits = hidden @ weight.T
    logits[2, 0, 0] = torch.inf
    assert nuclear_norm(logits).isnan().tolist() == [False, True, True]


def test_bad_arguments_are_named():
    for logits in (torch.zeros(3, 4), torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(0, 3, 4)):
        with pytest.raises(ValueError, match=r"`logits` must be floating \[B, T, D\] with B >= 1, but got torch"):
            nuclear_norm(logits)
    with pytest.raises(ValueError, match=r"`mask` must be bool \[2, 3\], but got torch.bool \[2, 4\]"):
        nuclear_norm(torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"`head_gram` must be fp32 or fp64 \[4, 4\], but got torch.float32 \[5, 5\]"
    ):
        nuclear_norm_from_hidden(torch.zeros(2, 3, 4), torch.eye(5))
    with pytest.raises(ValueError, match=r"`head_gram` must be fp32 or fp64 \[4, 4\], but got torch.float16"):
        nuclear_norm_from_hidden(torch.zeros(2, 3, 4), torch.eye(4).half())


def test_no_positions_at_all_give_zero():
    assert nuclear_norm(torch.zeros(2, 0, 5)).tolist() == [0, 0]
    assert nuclear_norm_from_hidden(torch.zeros(2, 0, 5), torch.eye(5)).tolist() == [0, 0]


@pytest.mark.parametrize("V", [8, 200])
def test_a_head_of_low_rank_needs_no_double_precision(V):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 100, 64, generator=g)
    weight = torch.randn(V, 16, generator=g) @ torch.randn(16, 64, generator=g)
    expected = slow_nuclear_norm(hidden.double() @ weight.double().T)
    got = nuclear_norm_from_hidden(hidden, gram_of_head(weight))
    torch.testing.assert_close(got.double(), expected, rtol=5e-3, atol=0)


def test_neither_autocast_nor_reduced_precision_reach_the_products():
    hidden, weight, mask = case(20, 16, 300)
    gram = gram_of_head(weight)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(gram_of_head(weight), gram)
            got = nuclear_norm_from_hidden(hidden, gram, mask)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, nuclear_norm_from_hidden(hidden, gram, mask))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 300), st.integers(0, 10**6), st.booleans())
def test_the_parts_of_the_head_give_the_scores_of_its_logits(T, d, V, seed, biased):
    hidden, weight, mask = case(T, d, V, seed)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(seed)) if biased else None
    by_head, by_logits = UtilityDiversityScorer(), UtilityDiversityScorer()
    by_head.use_head(weight, bias)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = by_logits.utility(logits.double(), mask)
    torch.testing.assert_close(by_head.utility(hidden.double(), mask), expected, rtol=1e-4, atol=1e-4)
    by_head.score(hidden, mask), by_logits.score(logits, mask)
    torch.testing.assert_close(by_head.sketches, by_logits.sketches, rtol=1e-3, atol=1e-3)


def test_sketches_of_other_projections_are_refused():
    state = UtilityDiversityScorer(seed=1).state_dict()
    with pytest.raises(
        ValueError, match=r"Argument `seed` must be 1, as for the sketches in the checkpoint, .* got 2"
    ):
        UtilityDiversityScorer(seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"Argument `normalization` must be 'length', .* got 'paper'"):
        UtilityDiversityScorer(normalization="paper", seed=1).load_state_dict(state)


def test_the_paper_rule_adds_raw_terms_and_ours_standardised_ones():
    u, d = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 0.0, 20.0])
    assert utility_diversity(u, d, 0.5, "paper").tolist() == [6.0, 2.0, 13.0]
    scaled = utility_diversity(u, d, 0.5)
    torch.testing.assert_close(utility_diversity(u * 7 + 3, d * 0.01, 0.5), scaled)
    assert utility_diversity(u, torch.zeros(3), 0.5).argmax() == 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.tuples(st.floats(0, 1e4, width=32), st.integers(0, 300)), min_size=1), max_size=6))
def test_length_trend_equals_the_least_squares_slope(sets):
    sets = [([u if n else 0.0 for u, n in pairs], [n for _, n in pairs]) for pairs in sets]
    trend = LengthTrend()
    for utilities, counts in sets:
        trend.update(trend.moments_of(torch.tensor(utilities), torch.tensor(counts)))
    u, n = torch.tensor([3.0, 5.0, 0.0]), torch.tensor([1, 10, 0])
    expected = [3.0, 5.0 / 10 ** slow_length_trend([[s] for s in sets]), 0.0]
    assert trend.remove(u, n).tolist() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.0])
def test_without_its_trend_the_norm_says_nothing_of_length(exponent):
    """Samples whose norm grows as a power of their length, and a broken one that must not bend the power."""
    generator, trend = torch.Generator().manual_seed(0), LengthTrend()
    for _ in range(60):
        n = torch.randint(1, 200, (16,), generator=generator)
        u = n**exponent * torch.rand(16, generator=generator).exp()
        free = trend.remove(u, n)
        u[3] = torch.nan
        trend.update(trend.moments_of(u, n))
    assert trend.moments[1] / trend.moments[0] == pytest.approx(exponent, abs=0.02)
    assert free.isfinite().all()


def test_where_every_sample_is_one_position_the_trend_changes_nothing():
    trend, ones = LengthTrend(), torch.ones(8, dtype=torch.int64)
    for _ in range(2000):
        trend.update(trend.moments_of(torch.rand(8), ones))
    u = torch.rand(8)
    assert torch.equal(trend.remove(u, ones), u)


def test_a_row_without_labels_ranks_last_by_the_formula_of_the_paper():
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False
    scores = UtilityDiversityScorer(normalization="paper").score(torch.randn(4, 6, 30), mask)
    assert scores.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("normalization", ["length", "none", "paper"])
def test_sequences_without_a_position_have_no_scored_position(normalization):
    scorer = UtilityDiversityScorer(normalization=normalization)
    scores = scorer.score(torch.randn(3, 0, 30), torch.ones(3, 0, dtype=torch.bool))
    assert scores.shape == (3,)
    assert scores.isnan().all() if normalization == "paper" else (scores == 0).all()
