"""What utility-diversity selection costs: the nuclear norm, its memory, a whole step, and the seam.

Run on an idle machine: ``python benchmarks/utility_diversity.py`` (all parts), or name some of
``norm memory step length cheaper seam``. Times are medians; ratios are taken within one run.
"""

import copy
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from curation.callbacks import ExactResume, UniformSelection, UtilityDiversitySelection
from curation.online.nuclear_norm import gram_of_head, nuclear_norm, nuclear_norm_from_hidden
from curation.online.utility_diversity import LengthTrend, UtilityDiversityScorer
from curation.scoring import IGNORED

HIDDEN = 576
SIZES = ((512, 32_000), (512, 152_064))


def median_seconds(fn: Callable[[], object], repeats: int = 5) -> float:
    """Median of several calls, after one that is not counted."""
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sample(T: int, V: int) -> tuple[Tensor, Tensor]:
    """Hidden states ``[1, T, d]`` and a head ``[V, d]``."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, T, HIDDEN, generator=g), torch.randn(V, HIDDEN, generator=g) / HIDDEN**0.5


def norm() -> None:
    """Time and relative error of each route against ``torch.linalg.svdvals`` on formed logits."""
    print("| T x V | route | seconds | times faster than svdvals | relative error |\n|---|---|---|---|---|")
    for T, V in SIZES:
        hidden, weight = sample(T, V)
        logits = hidden @ weight.T
        exact = torch.linalg.svdvals(logits[0].double()).sum()
        exact_product = nuclear_norm_from_hidden(hidden.double(), gram_of_head(weight, dtype=torch.float64))
        single, double = gram_of_head(weight), gram_of_head(weight, dtype=torch.float64)
        routes = {
            "svdvals, fp32": (lambda x=logits: torch.linalg.svdvals(x[0]).sum(), exact),
            "logits": (lambda x=logits: nuclear_norm(x), exact),
            "head, fp32": (lambda h=hidden, k=single: nuclear_norm_from_hidden(h, k), exact_product),
            "head, fp64": (lambda h=hidden, k=double: nuclear_norm_from_hidden(h, k), exact),
        }
        base = None
        for name, (fn, expected) in routes.items():
            seconds = median_seconds(fn, 3 if "svd" in name else 9)
            base = base or seconds
            error = abs(float(fn()) / float(expected) - 1)
            print(f"| {T} x {V:,} | {name} | {seconds:.4f} | {base / seconds:.1f} | {error:.1e} |", flush=True)


def _peak(route: str, T: int, V: int, B: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, HIDDEN, generator=g), torch.randn(V, HIDDEN, generator=g)
    gram = gram_of_head(weight, dtype=torch.float64)
    nuclear_norm_from_hidden(hidden[:1, :8], gram)  # libraries are loaded
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again at the present size
    before = _high_water()
    if route == "head":
        nuclear_norm_from_hidden(hidden, gram)
    else:
        nuclear_norm(hidden @ weight.T)
    queue.put((_high_water() - before) * 1024)


def _high_water() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def memory() -> None:
    """Peak resident memory that scoring adds to a trunk's forward, against the size of the logits."""
    print(
        "| B x T x V | logits | added by the head route | share | added by the logits route |\n|---|---|---|---|---|"
    )
    context = multiprocessing.get_context("spawn")
    for (T, V), B in zip(SIZES, (8, 4), strict=True):
        added = {}
        for route in ("head", "logits"):
            queue = context.Queue()
            process = context.Process(target=_peak, args=(route, T, V, B, queue))
            process.start()
            added[route] = queue.get() / 2**20
            process.join()
        logits = B * T * V * 4 / 2**20
        print(
            f"| {B} x {T} x {V:,} | {logits:,.0f} MiB | {added['head']:.0f} MiB | {added['head'] / logits:.1%} "
            f"| {added['logits']:,.0f} MiB |",
            flush=True,
        )


class Clock(Callback):
    """Seconds of each training batch, from the end of the one before: fetching and scoring included."""

    def __init__(self) -> None:
        self.last = 0.0
        self.seconds: list[float] = []

    def on_train_start(self, *_: object) -> None:
        """Start."""
        self.last = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """Stop and start again."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def fit_seconds(module: LightningModule, loader: DataLoader, steps: int, *callbacks: Callback) -> float:
    """Median seconds of a step of a fit, the first two left out."""
    clock = Clock()
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)
    return statistics.median(clock.seconds[2:])


def step() -> None:
    """Candidates per second against the ideal, on 6 layers of SmolLM2-135M, 32 candidates of 128 tokens."""
    from curation.recipes.chat import SupervisedFineTuning
    from curation.recipes.smollm2 import SMOLLM2

    original = SupervisedFineTuning(SMOLLM2, num_layers=6)
    original.configure_model()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 49_000, (256, 128), generator=g)
    labels = ids.clone()
    labels[:, :96] = -100  # the answer is the last quarter
    data = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": t} for i, t in zip(ids, labels, strict=True)
    ]

    def seconds(*callbacks: Callback, batch_size: int = 32, steps: int = 8) -> float:
        return fit_seconds(copy.deepcopy(original), DataLoader(data, batch_size), steps, *callbacks)

    batch = torch.utils.data.default_collate(data[:32])
    with torch.no_grad():
        forward = median_seconds(lambda: original.loss(batch))
    both = median_seconds(lambda: copy.deepcopy(original).loss(batch)[0].backward())
    measured_b = both / forward - 1
    full = seconds()
    print(f"forward {forward:.3f} s, with backward {both:.3f} s, b = {measured_b:.2f}; full step {full:.3f} s\n")
    columns = ("keep", "scoring", "seconds", "speed-up", "ideal, b = 2", "reached", "ideal, measured b", "reached")
    print("| " + " | ".join(columns) + " | two passes | reached |\n" + "|---" * 10 + "|")
    for keep, precision in itertools.product((0.25, 0.125), ("fit", "bf16")):
        ours = seconds(UtilityDiversitySelection(keep=keep, precision=precision))
        # The same two passes without any selection: a forward of all rows, then a step on the kept number of rows.
        two_passes = forward + seconds(batch_size=int(32 * keep))
        ideals = [(1 + b) / (1 + (1 + b) * keep) for b in (2.0, measured_b)]
        reached = [f"{i:.2f} | {full / ours / i:.0%}" for i in ideals]
        scoring = "fp32" if precision == "fit" else precision
        print(
            f"| {keep} | {scoring} | {ours:.3f} | {full / ours:.2f} | {reached[0]} | {reached[1]} "
            f"| {full / two_passes:.2f} | {two_passes / ours:.0%} |",
            flush=True,
        )


def real_model() -> tuple[LightningModule, list[dict[str, Tensor]]]:
    """SmolLM2-135M and twelve batches of 32 conversations."""
    from curation.recipes.chat import Conversations, SupervisedFineTuning
    from curation.recipes.smollm2 import SMOLLM2

    module = SupervisedFineTuning(SMOLLM2)
    module.configure_model()
    module.model.eval()
    data = Conversations("chitchat", max_samples=1000, val_samples=8)
    data.setup("fit")
    return module, list(itertools.islice(data.train_dataloader(), 12))


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation."""
    ranks = [x.argsort().argsort().double() for x in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def length() -> None:
    """How far each normalisation still ranks samples by their number of answer tokens."""
    module, batches = real_model()
    scorer, trend = UtilityDiversityScorer(), LengthTrend()
    columns: dict[str, list[Tensor]] = {}
    for batch in batches:
        mask = batch["labels"][:, 1:].ne(IGNORED)
        with torch.no_grad():
            logits = module.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            utility, n = scorer.utility(logits, mask), mask.sum(1)
            scorer.score(logits, mask)
        row = {
            "tokens": n,
            "`u`": utility,
            "`u / n`": utility / n,
            "`u / n^g`": trend.remove(utility, n),
            "sketch / sqrt(n)": scorer.sketches,
            "sketch": scorer.sketches * n.sqrt()[:, None],
        }
        trend.update(trend.moments_of(utility, n))
        for name, values in row.items():
            columns.setdefault(name, []).append(values)
    table = {name: torch.cat(values) for name, values in columns.items()}
    half = len(table["tokens"]) // 2
    print(f"g = {float(trend.moments[1] / trend.moments[0]):.2f}\n")
    print("| term | rank correlation with the number of tokens |\n|---|---|")
    for name in ("`u`", "`u / n`", "`u / n^g`"):
        print(f"| {name} | {correlation(table[name], table['tokens']):+.2f} |")
    for name in ("sketch", "sketch / sqrt(n)"):
        distance = torch.cdist(table[name][half:], table[name][:half]).mean(1)
        print(f"| mean distance of {name} | {correlation(distance, table['tokens'][half:]):+.2f} |")


def cheaper() -> None:
    """Cheaper scoring passes: how much time they take, and whether they rank candidates as the full one does."""
    module, batches = real_model()
    trunk, head = module.model.base_model, module.model.get_output_embeddings()
    layers = trunk.layers
    scorer = UtilityDiversityScorer(alpha=0.0)
    scorer.use_head(head.weight)

    def scores(batch: dict[str, Tensor], depth: int, bf16: bool) -> Tensor:
        trunk.layers = layers[:depth]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = trunk(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
        return scorer.score(hidden[:, :-1].float(), batch["labels"][:, 1:].ne(IGNORED))

    variants = {
        "all 30 layers": (30, False),
        "all, bf16": (30, True),
        "20 layers": (20, False),
        "10 layers": (10, False),
    }
    print("| scoring pass | time | rank correlation with the full one | kept alike at 25 % |\n|---|---|---|---|")
    base = None
    for name, (depth, bf16) in variants.items():
        seconds = median_seconds(lambda d=depth, b=bf16: scores(batches[0], d, b))
        base = base or seconds
        correlations, alike = [], []
        for batch in batches:
            full, cheap = scores(batch, 30, False), scores(batch, depth, bf16)
            correlations.append(correlation(full, cheap))
            k = len(full) // 4
            kept = [set(s.topk(k).indices.tolist()) for s in (full, cheap)]
            alike.append(len(kept[0] & kept[1]) / k)
        mean = statistics.mean
        print(f"| {name} | {seconds / base:.0%} | {mean(correlations):.2f} | {mean(alike):.0%} |", flush=True)


class Tiny(LightningModule):
    """A step that costs next to nothing, so that the overhead shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def seam() -> None:
    """What callbacks add to each step where nothing is scored."""
    data = torch.utils.data.TensorDataset(torch.randn(4096, 8), torch.randint(0, 4, (4096,)))
    callbacks = {"UniformSelection(keep=1.0)": lambda: UniformSelection(keep=1.0), "ExactResume()": ExactResume}
    added: dict[str, list[float]] = {name: [] for name in callbacks}
    for _ in range(7):
        base = fit_seconds(Tiny(), DataLoader(data, 8), 1500)
        for name, make in callbacks.items():
            added[name].append(fit_seconds(Tiny(), DataLoader(data, 8), 1500, make()) - base)
    print("| callback | added to a step | share of a 100 ms step |\n|---|---|---|")
    for name, seconds in added.items():
        median = statistics.median(seconds)
        print(f"| `{name}` | {median * 1e6:.0f} us | {median / 0.1:.2%} |")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parts = {"norm": norm, "memory": memory, "step": step, "length": length, "cheaper": cheaper, "seam": seam}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for part in sys.argv[1:] or parts:
        print(f"\n## {part}\n")
        parts[part]()
