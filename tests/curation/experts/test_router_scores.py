"""The scores of a router: by its code, by the weights that it returns, and what it is asked where neither tells."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curation.experts import load_balancing as lb
from curation.experts.router_scores import CANDIDATES, called_scores, fitting_scores
from curation.experts.router_statistics import router_statistics
from curation.experts.routers import Router, find_routers

FUNCTIONS = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
}


def draw(n=40, experts=8, seed=0, std=1.0):
    return std * torch.randn(n, experts, generator=torch.Generator().manual_seed(seed))


class Gate(nn.Module):
    """A router whose weights are made by a function that it is told, scaled or not."""

    def __init__(self, function, k=2, normalised=True, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        self.function, self.k, self.normalised, self.dtype = function, k, normalised, dtype

    def forward(self, x):
        logits = F.linear(x, self.weight)
        scores = FUNCTIONS[self.function](logits)
        weights, indices = scores.topk(self.k, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, 2.5 * weights.to(self.dtype), indices


def inferred(gate, scores=None):
    return Router("gate", gate, gate.k, scores, position=0, inferred=True)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(CANDIDATES),
    st.integers(1, 6),
    st.booleans(),
    st.floats(0.3, 4),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, *CANDIDATES]),
    st.integers(0, 99),
)
def test_weights_tell_the_scores_whatever_the_code_says(function, k, normalised, std, dtype, said, seed):
    gate = Gate(function, k, normalised and k > 1, dtype)
    router, logits = inferred(gate, said), draw(seed=seed, std=std)
    mask = torch.arange(40) % 5 > 0
    logits[~mask] = float("nan")
    output = gate(logits)
    p = router.probabilities(output[0], mask, output)
    if dtype == torch.float32 or said == function:
        assert router.scores == function
        expected = FUNCTIONS[function](logits[mask])
        torch.testing.assert_close(p[mask], expected / expected.sum(1, keepdim=True))
    elif said is not None:
        assert router.scores == said  # weights that are rounded do not outvote the code
    assert not p[~mask].any()


@pytest.mark.parametrize(("function", "scores"), [("sigmoid", "sigmoid"), ("softmax", "softmax")])
def test_scores_of_the_code_stay_where_all_logits_are_alike(function, scores):
    gate = Gate(function)
    router, output = inferred(gate, scores), gate(torch.zeros(4, 8))
    router.probabilities(output[0], None, output)
    assert router.scores == scores


@pytest.mark.parametrize("output", [lambda gate: gate(torch.zeros(4, 8)), lambda gate: (draw(4), None)])
def test_scores_that_nothing_tells_are_asked_for(output):
    gate = Gate("sigmoid")
    with pytest.raises(ValueError, match="Argument `scores` must be given: neither the code of the router gate nor"):
        router_statistics(inferred(gate), [output(gate)])
    assert router_statistics(inferred(gate, "sigmoid"), [output(gate)]).tokens == 4


def test_scores_that_were_given_stay():
    gate = Gate("sigmoid")
    output = gate(draw())
    router = Router("gate", gate, 2, "softmax", position=0)
    router.probabilities(output[0], None, output)
    assert router.scores == "softmax"


def test_a_call_in_which_no_token_counts_tells_nothing():
    gate = Gate("sigmoid")
    output, router = gate(draw(4)), inferred(gate)
    assert not router.probabilities(output[0], torch.zeros(4).bool(), output).any()
    router.probabilities(output[0], None, output)
    assert router.scores == "sigmoid"


def test_weights_that_no_function_explains_leave_it_to_the_code():
    logits = draw()
    weights, indices = (logits**2).topk(2)
    assert fitting_scores(logits, indices, weights) == {}
    assert fitting_scores(logits, torch.full((40, 2), -1), weights) == {}
    router = inferred(Gate("softmax"), "sigmoid")
    router.probabilities(logits, None, (logits, weights, indices))
    assert router.scores == "sigmoid"


def test_no_z_loss_of_probabilities():
    p = draw().softmax(-1)
    router = Router("blocks.0.gate", nn.Linear(8, 8), 2, "softmax")
    assert router_statistics(router, [p]).z_loss == 0
    with pytest.raises(ValueError, match=r"`z_coefficient` must be 0 .* probabilities, as blocks\.0\.gate does"):
        router_statistics(router, [p], z=True)


class Block(nn.Module):
    """Its own forward pass turns the logits into probabilities."""

    def __init__(self, shared=False, bias=False):
        super().__init__()
        self.gate, self.experts, self.top_k = nn.Linear(8, 8), nn.ModuleList(), 2
        if shared:
            self.shared_expert_gate = nn.Linear(8, 1)
        if bias:
            self.e_score_correction_bias = nn.Buffer(torch.zeros(8))


class SigmoidBlock(Block):
    def forward(self, x):
        return self._weigh(self.gate(x))

    def _weigh(self, logits):
        return logits.sigmoid()


class SharedBlock(Block):
    def forward(self, x):
        return self.gate(x).softmax(-1) + x.mean(-1, keepdim=True).sigmoid()


class Activation(Block):
    def __init__(self):
        super().__init__()
        self.act = nn.Sigmoid()

    def forward(self, x):
        return self.act(self.gate(x))


@pytest.mark.parametrize(
    ("block", "scores"),
    [
        (SigmoidBlock(), "sigmoid"),
        (Activation(), "sigmoid"),
        (SharedBlock(shared=True), "softmax"),
        (SharedBlock(bias=True), "sigmoid"),
        (SharedBlock(), None),
    ],
)
def test_the_block_of_a_plain_layer_tells_its_scores(block, scores):
    (router,) = find_routers(block)
    assert router.scores == scores


class Kernel(nn.Module):
    def forward(self, x):
        return F.softplus(x).sqrt()


class Noise(nn.Module):
    def forward(self, x):
        return (x + F.softplus(x)).softmax(-1)


def test_called_functions():
    assert called_scores(Kernel()) == {"sqrtsoftplus"}
    assert called_scores(Noise()) == {"softmax"}
    assert called_scores(nn.Linear(2, 2)) == set()


def test_roots_of_softplus():
    logits = torch.tensor([[-1e4, -50.0, 0.0, 3.0]], requires_grad=True)
    p = lb.probabilities(logits, "sqrtsoftplus")
    expected = F.softplus(logits.double()).sqrt()
    torch.testing.assert_close(p, (expected / expected.sum(1, keepdim=True)).float())
    p[0, 2].backward()
    assert logits.grad.isfinite().all()
