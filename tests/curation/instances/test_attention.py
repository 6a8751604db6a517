import pytest
import torch
import torch.nn.functional as F

from curation.instances import attention, hashing
from curation.instances.attention import GraphAttentionLayer, GraphAttentionNetwork, Training, focal_loss, train


def problem(n=400, k=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=draw)
    x = torch.randn(n, 4, generator=draw) + 2 * F.one_hot(y, 4)
    graph = hashing.multi_view(x, k, 2, 64, draw)
    order = hashing.buckets(x, hashing.bits(n, 64), draw).flatten()
    return x, y, graph, order[order >= 0]


def slow_layer(layer, x, ids):
    """A sum over each head and neighbour."""
    h = layer.project(x).view(len(x), layer.heads, layer.hidden)
    out = []
    for i, row in enumerate(ids.tolist()):
        neighbours = [j for j in [*row, i] if j >= 0]
        heads = []
        for head in range(layer.heads):
            logits = torch.stack(
                [h[j, head] @ layer.source[head] + h[i, head] @ layer.target[head] for j in neighbours]
            )
            attention = F.leaky_relu(logits, 0.2).softmax(0)
            heads.append(sum(a * h[j, head] for a, j in zip(attention, neighbours, strict=True)))
        out.append(torch.cat(heads))
    return F.elu(torch.stack(out) + layer.bias)


def test_a_layer_and_its_gradients_are_those_of_the_slow_twin():
    torch.manual_seed(0)
    layer = GraphAttentionLayer(4, 3, 2).double()
    x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(-1, 12, (12, 3))
    wanted = [x, *layer.parameters()]
    weights = torch.randn(12, 6, dtype=torch.float64)
    results = [
        (output, *torch.autograd.grad((output * weights).sum(), wanted))
        for output in (layer.attend(layer.table(x), slice(None), ids)[0], slow_layer(layer, x, ids))
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_layer_is_that_of_torch_geometric():
    conv = pytest.importorskip("torch_geometric.nn", reason="needs torch-geometric").GATConv(4, 3, heads=2)
    layer = GraphAttentionLayer(4, 3, 2)
    with torch.no_grad():
        layer.project.weight.copy_(conv.lin.weight)
        layer.source.copy_(conv.att_src[0])
        layer.target.copy_(conv.att_dst[0])
        layer.bias.copy_(conv.bias.normal_())
    x, _, graph, _ = problem(50)
    edges = torch.stack([graph.ids.flatten(), torch.arange(50).repeat_interleave(6)])
    torch.testing.assert_close(layer.attend(layer.table(x), slice(None), graph.ids)[0], F.elu(conv(x, edges)))


def test_a_part_of_the_rows_gets_what_all_get():
    x, _, graph, _ = problem(60)
    layer = GraphAttentionLayer(4, 3, 2)
    table = layer.table(x)
    whole = layer.attend(table, slice(None), graph.ids)
    part = layer.attend(table, slice(20, 45), graph.ids[20:45])
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one[20:45], other)


def test_the_attention_of_a_sample_sums_to_one():
    x, _, graph, _ = problem(60)
    layer = GraphAttentionLayer(4, 3, 2)
    _, attention = layer.attend(layer.table(x), slice(None), graph.ids)
    torch.testing.assert_close(attention.sum(1), torch.ones(60, 2))
    _, attention = layer.attend(layer.table(x), slice(None), torch.full_like(graph.ids, -1))
    assert (attention[:, -1] == 1).all()


def test_prediction_is_the_forward_pass():
    x, _, graph, _ = problem(60)
    network = GraphAttentionNetwork(4, 3)
    p, attention = network.predict(x, graph.ids)
    torch.testing.assert_close(p, network(x, graph.ids).softmax(1))
    assert attention.shape == graph.ids.shape


def test_the_focal_loss_is_that_of_the_paper():
    logits, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0])
    p = logits.softmax(1)[torch.arange(6), y]
    expected = (-weights * (1 - p) ** 2 * p.log()).sum() / weights.sum()
    torch.testing.assert_close(focal_loss(logits, y, weights), expected)
    torch.testing.assert_close(focal_loss(logits, y, torch.ones(6), gamma=0), F.cross_entropy(logits, y))


def test_training_learns_what_it_has_not_been_told():
    x, y, graph, order = problem()
    held = torch.arange(400) % 4 == 0
    network = train(x, y, graph, order, ~held, torch.zeros_like(held), Training(), 0)
    p, _ = network.predict(x, graph.ids)
    assert (p.argmax(1) == y)[held].float().mean() > 0.85


def test_labels_that_are_not_learned_make_no_difference():
    """What is scored out of fold must not know its own label."""
    x, y, graph, order = problem()
    held = torch.arange(400) % 4 == 0
    changed = torch.where(held, (y + 1) % 3, y)
    check = torch.arange(400) % 4 == 1
    one, other = (train(x, v, graph, order, ~held & ~check, check, Training(epochs=2), 0) for v in (y, changed))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_stops_where_the_held_out_labels_get_worse():
    x, y, graph, order = problem()
    check = torch.arange(400) % 2 == 0
    wrong = torch.where(check, (y + 1) % 3, y)
    short, long = (
        train(x, wrong, graph, order, ~check, check, Training(epochs=60, patience=p), 0).predict(x, graph.ids)[0]
        for p in (1, 10**6)
    )
    assert torch.equal(short, long)  # the best is that of the first epochs


def test_the_same_seed_gives_the_same_network_and_the_global_streams_are_left_alone():
    x, y, graph, order = problem()
    everything = torch.ones(400, dtype=torch.bool)
    before = torch.get_rng_state()
    networks = [train(x, y, graph, order, everything, ~everything, Training(epochs=1), s) for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    one, same, other = (n.classify.weight for n in networks)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("steps", "epochs", "expected"), [(4, None, 4), (12, None, 16), (4, 3, 6)])
def test_training_on_many_samples_has_as_many_steps_as_on_few(monkeypatch, steps, epochs, expected):
    """400 samples are two batches; an epoch is one of at most one batch, or of both, or there are three epochs."""
    x, y, graph, order = problem()
    everything, taken = torch.ones(400, dtype=torch.bool), []
    monkeypatch.setattr(attention, "STEPS", steps)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: taken.append(1) or step(*a, **k))
    train(x, y, graph, order, everything, ~everything, Training(epochs=epochs, patience=99), 0)
    assert len(taken) == expected


def test_it_trains_where_gradients_are_off():
    x, y, graph, order = problem(100)
    everything = torch.ones(100, dtype=torch.bool)
    with torch.no_grad():
        network = train(x, y, graph, order, everything, ~everything, Training(epochs=1), 0)
    assert network.classify.bias.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    x, y, graph, order = problem()
    here = (x.cuda(), y.cuda(), graph.to("cuda"), order.cuda())
    everything = torch.ones(400, dtype=torch.bool, device="cuda")
    network = train(*here, everything, everything, Training(), 0)
    assert (network.predict(here[0], here[2].ids)[0].argmax(1) == here[1]).float().mean() > 0.85


def test_a_few_samples_are_trained_on_for_no_more_steps_than_many(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(1))
    x, y, graph, order = problem(8)
    none = torch.zeros(8, dtype=torch.bool)
    train(x, y, graph, order, ~none, none, Training(), 0)  # nothing is held out, so it ends by itself
    assert len(steps) == 200
