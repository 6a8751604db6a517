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
    """Tells a token from itself; ``supervised`` is what that loss weighs."""

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
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.named_parameters()}
        self.gradients.append({name: g.clone() for name, g in found.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Tokens(Dataset):
    """Rows of 5 tokens from three of twelve, others in each micro-batch; where ``ragged``, of 1 to 5 that count."""

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


def routed(module, batch, own=False):
    """Of each layer: probabilities, choices, and the mask, a row for each token; ``own`` cuts what is before it."""
    found, h, mask = [], module.embed(batch["input_ids"]), batch["attention_mask"].flatten().bool()
    for layer in module.layers:
        p = layer.router(h.detach() if own else h).softmax(-1).flatten(0, 1)
        found.append((p, p.topk(K, dim=-1).indices, mask))
        h = layer(h)
    return found


def slow_counts(module, batch):
    """Choices of each layer: fp64 ``[L, E]``."""
    with torch.no_grad():
        return torch.stack([F.one_hot(c[m], EXPERTS).sum((0, 1)) for _, c, m in routed(module, batch)]).double()


def slow_gradients(module, ranks, coefficient, rule, average=None, own=False):
    """Gradients of a window by the definition of a rule, the mean over ranks.

    That of ``prepass`` is ``exact``, and that of ``deferred`` is ``running``, with what a router gets of its own
    layer's loss by ``exact`` instead.

    Args:
        module: A mixture.
        ranks: For every rank its micro-batches, of as many.
        coefficient: Of the loss.
        rule: Shares fp32 ``[L, E]`` of each micro-batch, of one rank; or ``micro``, ``rank``, ``running``, ``warm``,
            ``deferred``, ``prepass`` or ``exact``.
        average: Counts of an average micro-batch, for ``warm``.
        own: Of the loss of a router's own layer alone, and not of the supervised one.
    """
    given = None if isinstance(rule, str) else rule
    if given is None and rule == "deferred":
        found = slow_gradients(module, ranks, coefficient, "running")
        for sign, other in ((1, "exact"), (-1, "running")):
            for name, g in slow_gradients(module, ranks, coefficient, other, own=True).items():
                found[name] = found[name] + sign * g
        return found
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
            for layer, (p, _, mask) in enumerate(routed(module, batch, own)):
                f = seen[layer] / seen[layer].sum()
                balance = balance + EXPERTS * (f * p[mask].mean(0)).sum()
            supervised = 0 if own else module.loss(batch)
            total = total + (supervised + coefficient * weight * balance) / size / len(ranks)
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def error(found, expected, names=None):
    """The distance of gradients, relative to the length of the expected ones."""
    names = list(expected) if names is None else names
    distance, length = (
        torch.cat([f(name).flatten() for name in names]).norm()
        for f in (lambda n: found[n] - expected[n], lambda n: expected[n])
    )
    return float(distance / length)
