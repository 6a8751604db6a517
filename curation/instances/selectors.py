"""Instance selectors with the conventions of scikit-learn: random, coverage, graph attention, edited neighbours."""

from os import PathLike
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from curation.checks import (
    check_bytes,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_path,
    check_text,
)
from curation.instances import graph as graphs
from curation.instances import hashing
from curation.instances.attention import Training, train
from curation.instances.class_coverage import CAPACITY, cover_classes, mixture, reach
from curation.instances.coverage_shards import fit_in_shards
from curation.instances.graph import Graph
from curation.instances.selector import AnyTargetSelector, InstanceSelector, Strategy, Targets, class_budgets

GRAPHS = ("multiview", "multilevel", "lsh", "minibatch", "hnsw", "exact")


class StratifiedRandomSelector(AnyTargetSelector):
    """Random samples of each class: the baseline of every other selector.

    Args:
        budget: Fraction of the samples that stay, in (0, 1]; at least one sample of each class stays.
        sampling_strategy: Budgets of the classes, see :func:`~curation.instances.selector.class_budgets`.
        targets: What the targets are, as for :class:`CoverageInstanceSelector`.
        random_state: Seed or generator of the choice, as in scikit-learn.

    Raises:
        ValueError: In :meth:`fit`, if an argument has the wrong type or is out of its range.

    Example:
        >>> x, y = np.random.rand(20, 3), np.repeat(["cat", "dog"], 10)
        >>> StratifiedRandomSelector(budget=0.2, random_state=0).fit(x, y).report_["kept_per_class"]
        {'cat': 2, 'dog': 2}
    """

    def __init__(
        self,
        budget: float = 0.04,
        *,
        sampling_strategy: Strategy = "proportional",
        targets: Targets = "auto",
        random_state: Any = None,
    ) -> None:
        self.budget = budget
        self.sampling_strategy = sampling_strategy
        self.targets = targets
        self.random_state = random_state

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        budgets = class_budgets(y, self.budget, self.sampling_strategy, self.classes_)
        scores = np.random.default_rng(self._seed()).random(len(y), np.float32)
        return _best_of_classes(scores, y, budgets), scores


class CoverageInstanceSelector(AnyTargetSelector):
    """The samples of each class that cover the other samples of their class best.

    Targets that are numbers are sorted and cut into ``min(10, m)`` strata of as many samples, for a budget of ``m``
    samples, and these are treated as classes; so are all samples together where there are no targets
    (``fit(X)``). Either way exactly ``m`` samples stay, at least one.

    Greedy facility location (:func:`~curation.instances.coverage.cover`) on a graph of nearest neighbours by hashing
    (:func:`~curation.instances.hashing.multi_view`). The scores are the gains, 0 for samples that do not stay. Copies
    of a sample stay when all samples of the class that differ do. Time and memory are about linear in the number of
    samples.

    Args:
        budget: Fraction of the samples that stay, in (0, 1]; at least one sample of each class stays.
        sampling_strategy: Budgets of the classes, see :func:`~curation.instances.selector.class_budgets`.
        targets: ``"classes"``, ``"numbers"``, or ``"auto"``: numbers where one is not whole, else classes.
        n_neighbors: Number of neighbours in the graph; None for ``1 / budget``, clipped to [10, 25].
        n_views: Number of independent hashes.
        random_state: Seed or generator of the hashing, as in scikit-learn.
        device: Device of the graph; the covering runs on the CPU.
        memory: Bytes that all processes together may use, such as ``"4GB"``; None for what it takes. With it,
            :meth:`fit` takes features on disk, too, and selects in shards what does not fit
            (:mod:`curation.instances.coverage_shards`).
        folder: Where finished shards are kept, so that the same fit goes on after it was killed; None for nowhere.
            Shards of other features, targets or arguments are made anew.
        n_jobs: Shards at once, as far as the memory has room, in joblib's backend: loky, or dask or ray where
            ``joblib.parallel_config`` names it. None for that of ``parallel_config``, or one; -1 for all cores.
        verbose: Say what a fit in shards will take before it begins, and show how far it is.

    Raises:
        ImportError: If numba is missing.
        ValueError: In :meth:`fit`, if an argument has the wrong type or is out of its range.

    Example:
        >>> x, y = np.array([[0.0], [1.0], [2.0]]), np.zeros(3, int)
        >>> CoverageInstanceSelector(budget=0.34, random_state=0).fit(x, y).sample_indices_.tolist()
        [1]
        >>> ages = np.array([20.5, 31.0, 44.5, 52.0])
        >>> CoverageInstanceSelector(budget=0.5, random_state=0).fit(np.arange(4.0)[:, None], ages).report_["kept"]
        2
    """

    def __init__(
        self,
        budget: float = 0.04,
        *,
        sampling_strategy: Strategy = "proportional",
        targets: Targets = "auto",
        n_neighbors: int | None = None,
        n_views: int = 4,
        random_state: Any = None,
        device: str = "cpu",
        memory: int | str | None = None,
        folder: str | PathLike[str] | None = None,
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.budget = budget
        self.sampling_strategy = sampling_strategy
        self.targets = targets
        self.n_neighbors = n_neighbors
        self.n_views = n_views
        self.random_state = random_state
        self.device = device
        self.memory = memory
        self.folder = folder
        self.n_jobs = n_jobs
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:
        """Select.

        Args:
            X: Features ``[N, D]``, as of every selector; with ``memory`` also
                :class:`~curation.instances.FeatureShards`, or what such are made of: a file, a folder, a list.
            y: Classes or numbers ``[N]``, or None; with ``memory`` also the ``.npy`` file of these.

        Raises:
            ValueError: As of every selector; and if ``memory`` is too small, or files cannot be used.
        """
        if self.memory is None:
            return super().fit(X, y)
        self._check()
        return fit_in_shards(self, X, y, super().fit)

    def _check(self) -> None:
        super()._check()
        check_integer("n_neighbors", self.n_neighbors, 1, optional=True)
        check_integer("n_views", self.n_views, 1)
        check_text("device", self.device)
        check_bytes("memory", self.memory, optional=True)
        check_path("folder", self.folder, optional=True)
        if self.n_jobs == 0:
            raise ValueError("Argument `n_jobs` must be an integer other than 0 or None, but got 0.")
        check_integer("n_jobs", self.n_jobs, -1024, optional=True)
        check_flag("verbose", self.verbose)

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points = torch.from_numpy(x).to(self.device)
        budgets = class_budgets(y, self.budget, self.sampling_strategy, self.classes_)
        ones = torch.ones(len(x))
        k = self.n_neighbors or reach(self.budget)
        covered = cover_classes(points, y, ones, budgets, self._seed(), k, self.n_views)
        return covered.order, covered.gains


class GraphAttentionInstanceSelector(InstanceSelector):
    """Samples ranked by a graph attention network (arXiv 2502.20293).

    On each of ``n_graphs`` random graphs a network learns the classes of all samples but one fold, and scores the
    samples of that fold. The attention that samples receive is averaged over the graphs. The paper's tables and code
    are not public: this implementation is specified from its abstract.

    Args:
        budget: Fraction of the samples that stay, in (0, 1]; at least one sample of each class stays.
        graph: ``"multiview"``, ``"multilevel"`` or ``"lsh"`` hashing (:mod:`curation.instances.hashing`),
            ``"minibatch"`` (:func:`~curation.instances.graph.mini_batch`), or for reference faiss's ``"hnsw"`` and
            ``"exact"``.
        criterion: Score of a sample: ``"confidence"``, the probability ``p`` of its class; ``"ambiguity"``,
            ``p (1 - 0.95 p)``, large for samples that are of their class, but not surely; ``"margin"``, ``p`` less
            the largest probability of another class; or the ``"attention"`` that the sample receives.
        select: ``"coverage"`` takes the samples of each class that cover their class best, where each sample weighs
            as much as its score; ``"rank"`` the best of each class; ``"threshold"`` the best of all classes together.
        sampling_strategy: Budgets of the classes, see :func:`~curation.instances.selector.class_budgets`.
        n_neighbors: Number of neighbours in the graph.
        n_views: Number of independent hashes of a multi-view graph.
        n_graphs: Number of random graphs and networks. With one, samples are scored by a network that learned them.
        distance_quantile: Quantile of the edge lengths, in (0, 1], above which edges are left out.
        epochs: Most epochs of training; None for about 200 steps, whatever the number of samples.
        edge_dropout: Fraction of the edges that are left out in a step, in [0, 1).
        lr: Learning rate of AdamW.
        random_state: Seed or generator of graphs, networks and folds, as in scikit-learn.
        device: Device of graphs and networks; the covering runs on the CPU.

    Attributes:
        confidence_: fp32 ``[N]``, the probability of the sample's class.
        margin_: fp32 ``[N]``, this probability less the largest one of another class.
        attention_: fp32 ``[N]``, attention received, a sum over the samples that have the sample as a neighbour.
        homophily_: Fraction of the neighbours that are of the same class.

    Raises:
        ImportError: If numba is missing, or faiss for its graphs.
        ValueError: In :meth:`fit`, if an argument has the wrong type or is out of its range.

    Example:
        >>> x, y = np.random.rand(40, 3), np.repeat([0, 1], 20)
        >>> selector = GraphAttentionInstanceSelector(budget=0.1, n_graphs=1, epochs=1, random_state=0)
        >>> selector.get_params()["criterion"], len(selector.fit(x, y).sample_indices_)
        ('ambiguity', 4)
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
        epochs: int | None = None,
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
        check_choice("graph", self.graph, GRAPHS)
        check_choice("criterion", self.criterion, ("ambiguity", "confidence", "margin", "attention"))
        check_choice("select", self.select, ("coverage", "rank", "threshold"))
        for name in ("n_neighbors", "n_views", "n_graphs", "epochs"):
            check_integer(name, getattr(self, name), 1, optional=name == "epochs")
        check_number("distance_quantile", self.distance_quantile, "(0, 1]")
        check_number("edge_dropout", self.edge_dropout, "[0, 1)")
        check_number("lr", self.lr, "(0, inf)")
        check_text("device", self.device)

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
            covered = cover_classes(points, y, weights, budgets, seed, reach(self.budget), self.n_views)
            return covered.order, scores
        if self.select == "rank":
            return _best_of_classes(scores, y, budgets), scores
        return _best_of_all(scores, y, budgets.sum()), scores

    def _score(self, x: Tensor, y: Tensor, seed: int) -> None:
        """Set the scores, from one network for each graph."""
        n, generator = len(x), torch.Generator().manual_seed(seed)
        confidence, runner_up, attention = (torch.zeros(n, device=x.device) for _ in range(3))
        homophily = 0.0
        folds = _folds(y, self.n_graphs, generator)
        settings = Training(epochs=self.epochs, edge_dropout=self.edge_dropout, lr=self.lr)
        for fold in range(self.n_graphs):
            graph = self._graph(x, y, generator)
            scored = folds == fold  # all samples where there is one fold
            learned = ~scored if self.n_graphs > 1 else scored
            check = (_folds(y, 10, generator) == 0) & learned
            order = hashing.buckets(x, hashing.bits(n, CAPACITY), generator).flatten()
            network = train(x, y, graph, order[order >= 0], learned & ~check, check, settings, seed + fold)
            p, given = network.predict(x, graph.ids)
            p_class = p.gather(1, y[:, None])[:, 0]
            confidence = torch.where(scored, p_class, confidence)
            runner_up = torch.where(scored, p.scatter(1, y[:, None], 0).amax(1), runner_up)
            attention.index_add_(0, graph.ids.clamp(min=0).flatten(), (given * (graph.ids >= 0)).flatten())
            homophily += float(graph.homophily(y)) / self.n_graphs
        self.homophily_ = homophily
        self.confidence_ = confidence.cpu().numpy()
        self.margin_ = (confidence - runner_up).cpu().numpy()
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
    """Leaves out samples whose class differs from the class of most of their neighbours (Wilson 1972).

    Neighbours are found by hashing, so that time is about linear. A class of which nothing would stay is kept as it
    is. A filter has no budget; the scores are the fractions of the neighbours that have the sample's class.

    Args:
        n_neighbors: Number of neighbours.
        n_views: Number of independent hashes.
        random_state: Seed or generator of the hashing, as in scikit-learn.
        device: Device of the graph.

    Raises:
        ValueError: In :meth:`fit`, if an argument has the wrong type or is out of its range.

    Example:
        >>> x, y = np.concatenate([np.zeros((9, 1)), np.ones((9, 1))]), np.repeat([0, 1], 9)
        >>> y[0] = 1  # a wrong label
        >>> EditedNearestNeighboursFilter(n_neighbors=5, random_state=0).fit(x, y).get_support()[:2].tolist()
        [False, True]
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
        check_text("device", self.device)

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points, codes = torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)
        generator = torch.Generator().manual_seed(self._seed())
        ids = hashing.multi_view(points, self.n_neighbors, self.n_views, CAPACITY, generator).ids
        present = ids >= 0
        agree = ((codes[ids.clamp(min=0)] == codes[:, None]) & present).sum(1)
        scores = (agree / present.sum(1).clamp(min=1)).float().cpu().numpy()
        keep = (2 * agree >= present.sum(1)).cpu().numpy()
        keep |= np.isin(y, np.setdiff1d(y, y[keep]))
        rows = np.flatnonzero(keep)
        return rows[np.argsort(-scores[rows], kind="stable")], scores


def _folds(y: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """A part of ``parts`` for each sample, at random and even in every class: int64 ``[N]``."""
    folds = torch.empty_like(y)
    folds[graphs.by_class(y, generator)] = torch.arange(len(y), device=y.device) % parts
    return folds


def _best_of_classes(scores: np.ndarray, y: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The samples with the best scores of each class, best first."""
    rows = [np.flatnonzero(y == c) for c in range(len(budgets))]
    best = [r[np.argsort(-scores[r], kind="stable")[:m]] for r, m in zip(rows, budgets, strict=True)]
    return np.concatenate(best)[mixture(budgets)]


def _best_of_all(scores: np.ndarray, y: np.ndarray, m: int) -> np.ndarray:
    """The ``m`` samples with the best scores, among them the best of every class, best first."""
    ranked = np.argsort(-scores, kind="stable")
    first = np.sort(np.unique(y[ranked], return_index=True)[1])
    further = np.delete(np.arange(len(y)), first)[: m - len(first)]
    return ranked[np.sort(np.concatenate([first, further]))]
