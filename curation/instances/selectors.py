"""Which samples of a data set stay: selectors with the manners of scikit-learn."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from curation.instances import graph as graphs
from curation.instances import hashing
from curation.instances.attention import Training, train
from curation.instances.coverage import cover
from curation.instances.graph import Graph
from curation.instances.selector import InstanceSelector, Strategy, class_budgets
from curation.samplers.concept_choice import check_integer

CAPACITY = 256  # samples of a hash bucket at most


def _by_class(order_of: list[np.ndarray], budgets: np.ndarray) -> np.ndarray:
    """The selections of the classes as one, in which every beginning has the classes in the same proportions."""
    share = np.concatenate([(np.arange(m) + 0.5) / m for m in budgets])
    return np.concatenate(order_of)[share.argsort(kind="stable")]


def _cover_classes(
    x: Tensor, y: np.ndarray, weights: Tensor, budgets: np.ndarray, seed: int, n_neighbors: int, n_views: int
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`cover` of each class by its own samples: those that stay, best first, and gains fp32 ``[N]``."""
    gains, order_of = np.zeros(len(x), np.float32), []
    for c, m in enumerate(budgets):
        rows = np.flatnonzero(y == c)
        generator = torch.Generator().manual_seed(seed + c)
        graph = hashing.multi_view(x[torch.from_numpy(rows).to(x.device)], n_neighbors, n_views, CAPACITY, generator)
        chosen, gain = cover(graph, weights[rows], m)
        gains[rows[chosen]] = gain
        order_of.append(rows[chosen])
    return _by_class(order_of, budgets), gains


class StratifiedRandomSelector(InstanceSelector):
    """Samples of each class by chance: what every other selector has to beat.

    Args:
        budget: Share of the samples that stay, in (0, 1]; at least one of each class.
        sampling_strategy: See :func:`class_budgets`.
        random_state: Of the choice.
    """

    def __init__(
        self, budget: float = 0.04, *, sampling_strategy: Strategy = "proportional", random_state: Any = None
    ) -> None:
        self.budget = budget
        self.sampling_strategy = sampling_strategy
        self.random_state = random_state

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        budgets = class_budgets(y, self.budget, self.sampling_strategy, self.classes_)
        scores = np.random.default_rng(self._seed()).random(len(y), np.float32)
        return _best_of_classes(scores, y, budgets), scores


class CoverageInstanceSelector(InstanceSelector):
    """The samples of each class that stand best for the others of their class.

    Greedy facility location (:func:`~curation.instances.coverage.cover`) on the nearest neighbours by hashing
    (:func:`~curation.instances.hashing.multi_view`), about as many as there are samples to one that stays. The scores
    are the gains, 0 for what does not stay. About linear in time and memory.

    Args:
        budget: Share of the samples that stay, in (0, 1]; at least one of each class.
        sampling_strategy: See :func:`class_budgets`.
        n_neighbors: None for ``1 / budget``, in [10, 25].
        n_views: Of the hashing.
        random_state: Of the hashing.
        device: Of the graph; the covering is on the CPU.

    Raises:
        ImportError: If numba is missing.
    """

    def __init__(
        self,
        budget: float = 0.04,
        *,
        sampling_strategy: Strategy = "proportional",
        n_neighbors: int | None = None,
        n_views: int = 4,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.budget = budget
        self.sampling_strategy = sampling_strategy
        self.n_neighbors = n_neighbors
        self.n_views = n_views
        self.random_state = random_state
        self.device = device

    def _check(self) -> None:
        super()._check()
        if self.n_neighbors is not None:
            check_integer("n_neighbors", self.n_neighbors, 1)
        check_integer("n_views", self.n_views, 1)

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points = torch.from_numpy(x).to(self.device)
        budgets = class_budgets(y, self.budget, self.sampling_strategy, self.classes_)
        ones = torch.ones(len(x))
        k = self.n_neighbors or _reach(self.budget)
        return _cover_classes(points, y, ones, budgets, self._seed(), k, self.n_views)


class GraphAttentionInstanceSelector(InstanceSelector):
    """Samples ranked by a graph attention network (arXiv 2502.20293).

    On each of ``n_graphs`` random graphs a network learns to tell the classes of all samples but a part, each graph
    another, and scores those it has not learned. The attention that samples receive is averaged over the graphs. The
    paper's tables and code are not public: this is a specification of our own of what its abstract names.

    Args:
        budget: Share of the samples that stay, in (0, 1]; at least one of each class.
        graph: ``"multiview"``, ``"multilevel"`` or ``"lsh"`` hashing (:mod:`curation.instances.hashing`),
            ``"minibatch"`` (:func:`~curation.instances.graph.mini_batch`), or for reference faiss's ``"hnsw"`` and
            ``"exact"``.
        criterion: ``"confidence"``, the probability ``p`` of the sample's class; ``"ambiguity"``, ``p (1 - 0.95 p)``,
            large for what is of its class, but not surely; ``"margin"``, ``p`` less the largest of the others; or
            ``"attention"`` received.
        select: ``"coverage"`` takes the samples of each class that stand best for the others of it, each of which
            counts by the criterion; ``"rank"`` the best of each class; ``"threshold"`` the best of all together.
        sampling_strategy: See :func:`class_budgets`.
        n_neighbors: Of the graph.
        n_views: Of the multi-view hashing.
        n_graphs: Random graphs. One is scored in sample.
        distance_quantile: Longer edges than this quantile of all are left out.
        epochs: Of training at most; more where they would be less than 200 steps.
        edge_dropout: Share of the edges left out in a step.
        lr: Learning rate of AdamW.
        random_state: Of everything.
        device: Of graphs and networks; the covering is on the CPU.

    Attributes:
        confidence_: fp32 ``[N]``, the probability of the sample's class.
        margin_: fp32 ``[N]``.
        attention_: fp32 ``[N]``, received: a sum over those whose neighbour the sample is.
        homophily_: Share of the neighbours that are of the same class.
    """

    def __init__(
        self,
        budget: float = 0.04,
        *,
        graph: Literal["multiview", "multilevel", "lsh", "minibatch", "hnsw", "exact"] = "multiview",
        criterion: Literal["ambiguity", "confidence", "margin", "attention"] = "ambiguity",
        select: Literal["coverage", "rank", "threshold"] = "coverage",
        sampling_strategy: Strategy = "proportional",
        n_neighbors: int = 10,
        n_views: int = 4,
        n_graphs: int = 4,
        distance_quantile: float = 1.0,
        epochs: int = 10,
        edge_dropout: float = 0.3,
        lr: float = 5e-3,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.budget = budget
        self.graph = graph
        self.criterion = criterion
        self.select = select
        self.sampling_strategy = sampling_strategy
        self.n_neighbors = n_neighbors
        self.n_views = n_views
        self.n_graphs = n_graphs
        self.distance_quantile = distance_quantile
        self.epochs = epochs
        self.edge_dropout = edge_dropout
        self.lr = lr
        self.random_state = random_state
        self.device = device

    def _check(self) -> None:
        super()._check()
        for name, choice, options in (
            ("graph", self.graph, ("multiview", "multilevel", "lsh", "minibatch", "hnsw", "exact")),
            ("criterion", self.criterion, ("ambiguity", "confidence", "margin", "attention")),
            ("select", self.select, ("coverage", "rank", "threshold")),
        ):
            if choice not in options:
                raise ValueError(f"Argument `{name}` must be one of {', '.join(options)}, but got {choice!r}.")
        for name in ("n_neighbors", "n_views", "n_graphs", "epochs"):
            check_integer(name, getattr(self, name), 1)
        for name, region, value, inside in (
            ("distance_quantile", "(0, 1]", self.distance_quantile, 0 < self.distance_quantile <= 1),
            ("edge_dropout", "[0, 1)", self.edge_dropout, 0 <= self.edge_dropout < 1),
            ("lr", "(0, inf)", self.lr, 0 < self.lr < float("inf")),
        ):
            if not inside:
                raise ValueError(f"Argument `{name}` must be in {region}, but got {value!r}.")

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seed = self._seed()
        budgets = class_budgets(y, self.budget, self.sampling_strategy, self.classes_)
        points, codes = torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)
        self._score(points, codes, seed)
        p = self.confidence_
        ambiguous = self.criterion == "ambiguity"
        scores = p * (1 - 0.95 * p) if ambiguous else getattr(self, f"{self.criterion}_")
        if self.select == "coverage":
            weights = torch.from_numpy(scores).clamp(min=0)
            order, _ = _cover_classes(points, y, weights, budgets, seed, _reach(self.budget), self.n_views)
            return order, scores
        if self.select == "rank":
            return _best_of_classes(scores, y, budgets), scores
        return _best_of_all(scores, y, budgets.sum()), scores

    def _score(self, x: Tensor, y: Tensor, seed: int) -> None:
        """Set the scores by one network for each graph."""
        n, generator = len(x), torch.Generator().manual_seed(seed)
        confidence, other, attention = (torch.zeros(n, device=x.device) for _ in range(3))
        homophily = 0.0
        folds = _folds(y, self.n_graphs, generator)
        how = Training(epochs=self.epochs, edge_dropout=self.edge_dropout, lr=self.lr)
        for fold in range(self.n_graphs):
            graph = self._graph(x, y, generator)
            scored = folds == fold  # all of them where there is but one
            learned = ~scored if self.n_graphs > 1 else scored
            check = (_folds(y, 10, generator) == 0) & learned
            order = hashing.buckets(x, hashing.bits(n, CAPACITY), generator).flatten()
            network = train(x, y, graph, order[order >= 0], learned & ~check, check, how, seed + fold)
            p, given = network.predict(x, graph.ids)
            own = p.gather(1, y[:, None])
            confidence = torch.where(scored, own[:, 0], confidence)
            other = torch.where(scored, p.scatter(1, y[:, None], 0).amax(1), other)
            attention.index_add_(0, graph.ids.clamp(min=0).flatten(), (given * (graph.ids >= 0)).flatten())
            homophily += float(graph.homophily(y)) / self.n_graphs
        self.homophily_ = homophily
        self.confidence_ = confidence.cpu().numpy()
        self.margin_ = (confidence - other).cpu().numpy()
        self.attention_ = (attention / self.n_graphs).cpu().numpy()

    def _graph(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Graph:
        k = min(self.n_neighbors, len(x) - 1)
        if self.graph == "multiview":
            graph = hashing.multi_view(x, k, self.n_views, CAPACITY, generator)
        elif self.graph == "multilevel":
            graph = hashing.multi_level(x, k, CAPACITY, generator)
        elif self.graph == "lsh":
            graph = hashing.single_level(x, k, CAPACITY, generator)
        elif self.graph == "minibatch":
            graph = graphs.mini_batch(x, y, k, CAPACITY, generator)
        else:
            graph = (graphs.hierarchical_small_world if self.graph == "hnsw" else graphs.exact)(x, k)
        return graph if self.distance_quantile == 1 else graph.closest(self.distance_quantile)


class EditedNearestNeighboursFilter(InstanceSelector):
    """Leaves out samples whose class is not that of most of their neighbours (Wilson 1972).

    Its neighbours are those by hashing, so that it is about linear. Keeps a class as it is where nothing of it would
    be left. A filter has no budget: what stays is all that agrees; the scores are the share of the neighbours that
    agree.

    Args:
        n_neighbors: Asked.
        n_views: Of the hashing.
        random_state: Of the hashing.
        device: Of the graph.
    """

    def __init__(
        self, *, n_neighbors: int = 10, n_views: int = 4, random_state: Any = None, device: str = "cpu"
    ) -> None:
        self.n_neighbors = n_neighbors
        self.n_views = n_views
        self.random_state = random_state
        self.device = device

    def _check(self) -> None:
        check_integer("n_neighbors", self.n_neighbors, 1)
        check_integer("n_views", self.n_views, 1)

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points, codes = torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)
        generator = torch.Generator().manual_seed(self._seed())
        ids = hashing.multi_view(points, self.n_neighbors, self.n_views, CAPACITY, generator).ids
        known = ids >= 0
        agree = ((codes[ids.clamp(min=0)] == codes[:, None]) & known).sum(1)
        scores = (agree / known.sum(1).clamp(min=1)).float().cpu().numpy()
        keep = (2 * agree >= known.sum(1)).cpu().numpy()
        keep |= np.isin(y, np.setdiff1d(y, y[keep]))
        rows = np.flatnonzero(keep)
        return rows[np.argsort(-scores[rows], kind="stable")], scores


def _reach(budget: float) -> int:
    """Neighbours to cover by: about as many samples as there are to one that stays."""
    return round(min(max(1 / budget, 10), 25))


def _folds(y: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """A part of ``parts`` for each sample, at random and even in every class: int64 ``[N]``."""
    folds = torch.empty_like(y)
    folds[graphs.by_class(y, generator)] = torch.arange(len(y), device=y.device) % parts
    return folds


def _best_of_classes(scores: np.ndarray, y: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The samples with the best scores of each class, best first."""
    rows = [np.flatnonzero(y == c) for c in range(len(budgets))]
    return _by_class(
        [r[np.argsort(-scores[r], kind="stable")[:m]] for r, m in zip(rows, budgets, strict=True)], budgets
    )


def _best_of_all(scores: np.ndarray, y: np.ndarray, m: int) -> np.ndarray:
    """The ``m`` samples with the best scores, among them the best of every class, best first."""
    ranked = np.argsort(-scores, kind="stable")
    first = np.sort(np.unique(y[ranked], return_index=True)[1])
    others = np.delete(np.arange(len(y)), first)[: m - len(first)]
    return ranked[np.sort(np.concatenate([first, others]))]
