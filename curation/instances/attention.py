"""A graph attention network that predicts the class of a sample from the sample and its neighbours.

Architecture: arXiv 1710.10903. Its confidence and the attention that samples receive rank instances (arXiv
2502.20293). With neighbour lists of fixed length a layer is one weighted sum of table rows (``embedding_bag``), in
which ``[N, k, F]`` never exists. Training takes mini-batches of samples that lie side by side, with the edges among
them; prediction takes the whole graph, a layer at a time.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curation import rng
from curation.checks import check_integer
from curation.instances.graph import Graph

CHUNK = 2**14  # samples predicted at a time
BLOCKS = 128  # blocks of neighbouring samples in a batch: fewer keep more edges, more are closer to a random batch
STEPS = 200  # of a training: twice as many, on larger data, taught no more


class Table(NamedTuple):
    """Projected samples ``W x`` ``[N, H, F]``, their parts of the logits ``[N, H]``, and the bias ``[H F]``."""

    h: Tensor
    source: Tensor
    target: Tensor
    bias: Tensor


class GraphAttentionLayer(nn.Module):
    """``h_i = ELU(sum_j a_ij W x_j)`` over the neighbours ``j`` of ``i`` and ``i`` itself, for each of several heads.

    ``a_ij = softmax_j(LeakyReLU(s . W x_j + t . W x_i))`` (arXiv 1710.10903, eq. 3 to 5). Linear in the samples.

    Args:
        features: Features of the input.
        hidden: Features of a head.
        heads: Number of heads.

    Raises:
        ValueError: If an argument is not an integer >= 1.
    """

    def __init__(self, features: int, hidden: int, heads: int) -> None:
        super().__init__()
        for name, value in (("features", features), ("hidden", hidden), ("heads", heads)):
            check_integer(name, value, 1)
        self.heads, self.hidden = heads, hidden
        self.project = nn.Linear(features, heads * hidden, bias=False)
        self.source, self.target = (nn.Parameter(torch.empty(heads, hidden)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(heads * hidden))
        for parameter in (self.project.weight, self.source, self.target):
            nn.init.xavier_uniform_(parameter)

    def table(self, x: Tensor, heads: slice = slice(None)) -> Table:
        """The table of samples ``[N, D]`` for some of the heads."""
        weight = self.project.weight.view(self.heads, self.hidden, -1)[heads].flatten(0, 1)
        h = F.linear(x, weight).view(len(x), -1, self.hidden)
        source, target = (torch.einsum("nhf,hf->nh", h, a[heads]) for a in (self.source, self.target))
        return Table(h, source, target, self.bias.view(self.heads, self.hidden)[heads].flatten())

    def attend(self, table: Table, rows: slice, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output for some rows of the table.

        Args:
            table: The table of all samples, from :meth:`table`.
            rows: Rows of ``B`` samples in the table.
            ids: int64 ``[B, k]``, rows of the neighbours in the table; -1 for no neighbour.

        Returns:
            ``[B, H F]`` and the attention ``[B, k + 1, H]``; the last column is the attention to the sample itself.
        """
        h, source, target, bias = table
        heads = h.shape[1]
        itself = torch.arange(len(h), device=ids.device)[rows]
        ids = torch.cat([ids, itself[:, None]], 1)
        missing = ids < 0
        ids = ids.clamp(min=0)
        # By index_select, whose gradient is an index_add; that of source[ids] is slow.
        sources = source.index_select(0, ids.flatten()).view(*ids.shape, -1)
        logits = F.leaky_relu(sources + target[rows, None], 0.2).masked_fill(missing[..., None], -torch.inf)
        attention = logits.softmax(1)
        entries = (ids[:, None] * heads + torch.arange(heads, device=ids.device)[:, None]).flatten(0, 1)
        out = F.embedding_bag(
            entries, h.flatten(0, 1), per_sample_weights=attention.mT.flatten(0, 1).contiguous(), mode="sum"
        )
        return F.elu(out.view(len(itself), -1) + bias), attention


class GraphAttentionNetwork(nn.Module):
    """Two layers of graph attention and a linear layer, which gives the logits of the classes.

    Args:
        features: Features of a sample.
        classes: Number of classes.
        hidden: Features of a head.
        heads: Number of heads.
    """

    def __init__(self, features: int, classes: int, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.first = GraphAttentionLayer(features, hidden, heads)
        self.second = GraphAttentionLayer(heads * hidden, hidden, heads)
        self.classify = nn.Linear(heads * hidden, classes)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Logits ``[N, C]`` of samples ``[N, D]`` with neighbours ``[N, k]`` among them."""
        for layer in (self.first, self.second):
            x, _ = layer.attend(layer.table(x), slice(None), ids)
        return self.classify(x)

    @torch.no_grad()
    def predict(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities fp32 ``[N, C]``, and the attention ``[N, k]`` to neighbours, the mean of layers and heads.

        A head at a time, so that of all samples only its table and the first layer's output are held.
        """
        attention = torch.zeros(ids.shape, device=x.device)
        hidden = x.new_empty(len(x), self.classify.in_features)
        logits = self.classify.bias.repeat(len(x), 1)
        parts = [slice(start, start + CHUNK) for start in range(0, len(x), CHUNK)]
        for layer in (self.first, self.second):
            for head in range(layer.heads):
                columns = slice(head * layer.hidden, (head + 1) * layer.hidden)
                table = layer.table(x if layer is self.first else hidden, slice(head, head + 1))
                for part in parts:
                    output, weights = layer.attend(table, part, ids[part])
                    attention[part] += weights[:, :-1, 0] / (2 * layer.heads)
                    if layer is self.first:
                        hidden[part, columns] = output
                    else:
                        logits[part] += F.linear(output, self.classify.weight[:, columns])
        return logits.float().softmax(1), attention


def focal_loss(logits: Tensor, y: Tensor, weights: Tensor, gamma: float = 2.0) -> Tensor:
    """``-w (1 - p)^gamma log p`` of the classes ``y``, averaged with the weights ``w`` (arXiv 1708.02002, eq. 5).

    Args:
        logits: ``[B, C]``.
        y: int64 ``[B]``.
        weights: ``[B]``, the weight of the sample's class, or 0 for a sample that does not count.
        gamma: Focusing parameter, >= 0; 0 gives cross-entropy.

    Example:
        >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), torch.ones(1)) * 4  # log(2) / 4
        tensor(0.6931)
    """
    log_p = logits.float().log_softmax(-1).gather(1, y[:, None])[:, 0]
    return -(weights * (1 - log_p.exp()) ** gamma * log_p).sum() / weights.sum().clamp(min=1e-12)


@dataclass(frozen=True)
class Training:
    """Settings of the training of a network.

    Attributes:
        epochs: Most epochs; None for as many as have 200 steps, of which one may then be a part of the samples.
        patience: Epochs without a better loss on the held-out samples after which training ends.
        lr: Learning rate of AdamW.
        edge_dropout: Fraction of the edges that is left out at random in every step.
        batch_size: Most samples in a step; small data sets have smaller batches.
    """

    epochs: int | None = None
    patience: int = 3
    lr: float = 5e-3
    edge_dropout: float = 0.3
    batch_size: int = 1024


@torch.enable_grad()
def train(
    x: Tensor, y: Tensor, graph: Graph, order: Tensor, learn: Tensor, check: Tensor, settings: Training, seed: int
) -> GraphAttentionNetwork:
    """A network trained on some of the labels; the other samples take part as neighbours without labels.

    Args:
        x: Features, fp32 ``[N, D]``.
        y: Classes, int64 ``[N]`` in ``[0, C)``.
        graph: Graph of the samples.
        order: int64 ``[N]``, an order in which near samples are side by side.
        learn: bool ``[N]``, the samples whose labels are trained on.
        check: bool ``[N]``, the held-out samples, whose loss stops training early.
        settings: Settings of the training.
        seed: Seed of the weights, the batches and the dropped edges.
    """
    n, classes = len(x), int(y.max()) + 1
    with rng.isolated():
        rng.seed(seed)
        network = GraphAttentionNetwork(x.shape[1], classes).to(x.device)
    draw = torch.Generator(x.device).manual_seed(seed)
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=x.device)
    x, y, learn, check = (values[order] for values in (x, y, learn, check))
    ids = graph.ids[order]
    ids = torch.where(ids < 0, -1, place[ids.clamp(min=0)])  # places in the order, as the batches are
    counts = y[learn].bincount(minlength=classes)
    weights = (1 / counts.clamp(min=1))[y] * (len(y) / classes)
    size = min(settings.batch_size, max(256, n // 16))
    block = -(-size // BLOCKS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, fused=True)
    best, bad, best_state = torch.inf, 0, network.state_dict()
    local_of = torch.full((n,), -1, device=x.device)
    epochs, most = settings.epochs, None  # most steps of an epoch
    if epochs is None:
        most = STEPS // 4
        epochs = -(-STEPS * size // min(max(n, size), most * size))  # an epoch is a step at least
    for _ in range(epochs):
        shift = int(torch.randint(block, (1,), generator=draw, device=x.device))  # so that the cuts move
        blocks = torch.nn.functional.pad(torch.arange(n, device=x.device), (shift, -(shift + n) % block), value=-1)
        blocks = blocks.view(-1, block)
        blocks = blocks[torch.randperm(len(blocks), generator=draw, device=x.device)]
        total = torch.zeros(2, device=x.device)
        for part in blocks.split(BLOCKS)[:most]:
            part = part[part >= 0]
            local_of[part] = torch.arange(len(part), device=x.device)
            local = torch.where(ids[part] < 0, -1, local_of[ids[part]])
            local_of[part] = -1
            dropped = torch.rand(local.shape, generator=draw, device=x.device) < settings.edge_dropout
            local = local.masked_fill(dropped, -1)
            logits = network(x[part], local)
            optimizer.zero_grad()
            focal_loss(logits, y[part], weights[part] * learn[part]).backward()
            optimizer.step()
            held = weights[part] * check[part]
            total += torch.stack([focal_loss(logits.detach(), y[part], held) * held.sum(), held.sum()])
        loss = float(total[0] / total[1])
        if not loss >= best:  # NaN, where nothing is held out, counts as better
            best, bad = loss, 0
            best_state = {name: value.clone() for name, value in network.state_dict().items()}
        else:
            bad += 1
            if bad > settings.patience:
                break
    network.load_state_dict(best_state)
    return network
