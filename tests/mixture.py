"""A mixture of experts that is small enough to differentiate by hand, and its load-balancing loss, slowly."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

EXPERTS, K, VOCABULARY = 4, 2, 12


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, 6, 6) / 3)
        self.top_k = K

    def forward(self, h):
        probabilities = self.router(h).softmax(-1)
        weights, chosen = probabilities.topk(K, dim=-1)
        outputs = torch.einsum("btd,edf->btef", h, self.experts).tanh()
        picked = outputs.gather(2, chosen[..., None].expand(*chosen.shape, 6))
        return h + (weights[..., None] * picked).sum(2)


class Mixture(LightningModule):
    """Predicts each token from itself; ``supervised`` is the weight of that loss."""

    def __init__(self, supervised=1.0, layers=2, lr=0.1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, 6)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.head = nn.Linear(6, VOCABULARY)
        self.supervised, self.lr = supervised, lr
        self.gradients = []

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)

    def loss(self, batch):
        logits = self(batch["input_ids"])
        losses = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="none")
        mask = batch["attention_mask"].flatten()
        return self.supervised * (losses * mask).sum() / mask.sum()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.named_parameters()}
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Tokens(Dataset):
    """Rows of 5 tokens, of three tokens for each micro-batch; if ``ragged``, 1 to 5 of a row count."""

    def __init__(self, rows, size, ragged=False, seed=0):
        draw = torch.Generator().manual_seed(seed)
        domain = (torch.arange(rows) // size) % 4
        self.ids = torch.randint(0, 3, (rows, 5), generator=draw) + 3 * domain[:, None]
        lengths = torch.randint(1, 6, (rows,), generator=draw) if ragged else torch.full((rows,), 5)
        self.mask = (torch.arange(5) < lengths[:, None]).long()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i]}

    def batches(self, size):
        return list(DataLoader(self, size))


def routed(module, batch, own_layer=False):
    """Probabilities, choices and mask of each layer, a row for each token; ``own_layer`` detaches its inputs."""
    layers, h, mask = [], module.embed(batch["input_ids"]), batch["attention_mask"].flatten().bool()
    for layer in module.layers:
        p = layer.router(h.detach() if own_layer else h).softmax(-1).flatten(0, 1)
        layers.append((p, p.topk(K, dim=-1).indices, mask))
        h = layer(h)
    return layers


def slow_counts(module, batch):
    """Choices of each expert in each layer: fp64 ``[L, E]``."""
    with torch.no_grad():
        return torch.stack([F.one_hot(c[m], EXPERTS).sum((0, 1)) for _, c, m in routed(module, batch)]).double()


def slow_gradients(module, ranks, coefficient, rule, average=None, own_layer=False):
    """Gradients of a window by the definition of a rule, the mean over ranks.

    ``prepass`` is ``exact``. ``deferred`` is ``running``, except that a router gets the gradient of its own layer's
    loss from ``exact``.

    Args:
        module: A mixture.
        ranks: The micro-batches of every rank, equally many.
        coefficient: Factor of the loss.
        rule: Fractions fp32 ``[L, E]`` for each micro-batch of a single rank; or ``micro``, ``rank``, ``running``,
            ``warm``, ``deferred``, ``prepass`` or ``exact``.
        average: Counts of an average micro-batch, for ``warm``.
        own_layer: Whether to differentiate only the loss of a router's own layer, and not the supervised loss.
    """
    given = None if isinstance(rule, str) else rule
    if given is None and rule == "deferred":
        gradients = slow_gradients(module, ranks, coefficient, "running")
        for sign, term in ((1, "exact"), (-1, "running")):
            for name, g in slow_gradients(module, ranks, coefficient, term, own_layer=True).items():
                gradients[name] = gradients[name] + sign * g
        return gradients
    size = len(ranks[0])
    counts = [[slow_counts(module, batch) for batch in rank] for rank in ranks]
    tokens = [[batch["attention_mask"].sum() for batch in rank] for rank in ranks]
    total = 0
    for r, rank in enumerate(ranks):
        for a, batch in enumerate(rank):
            at_once = sum(of_rank[a] for of_rank in tokens)
            if given is not None:
                seen, weight = given[a], 1.0
            elif rule == "micro":
                seen, weight = counts[r][a], 1.0
            elif rule == "rank":
                seen, weight = sum(counts[r][: a + 1]), 1.0
            elif rule in ("running", "warm"):
                seen = sum(sum(of_rank[: a + 1]) for of_rank in counts)
                weight = len(ranks) * tokens[r][a] / at_once
                if rule == "warm" and average is not None:
                    missing = (a + 1) * average - seen
                    seen = seen + (size - a - 1) * (average + missing / 2 / size)
            else:
                seen = sum(map(sum, counts))
                weight = len(ranks) * size * tokens[r][a] / sum(map(sum, tokens))
            balance = 0
            for layer, (p, _, mask) in enumerate(routed(module, batch, own_layer)):
                f = seen[layer] / seen[layer].sum()
                balance = balance + EXPERTS * (f * p[mask].mean(0)).sum()
            supervised = 0 if own_layer else module.loss(batch)
            total = total + (supervised + coefficient * weight * balance) / size / len(ranks)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def error(gradients, expected, names=None):
    """The distance of gradients, relative to the length of the expected ones."""
    names = list(expected) if names is None else names
    distance, length = (
        torch.cat([f(name).flatten() for name in names]).norm()
        for f in (lambda n: gradients[n] - expected[n], lambda n: expected[n])
    )
    return float(distance / length)
