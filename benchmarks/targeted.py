"""Selection for a target: precision on eight domains of text, and its time beside a faiss flat search.

python benchmarks/targeted.py precision  # which rows of eight domains are kept for examples of one, and of three
python benchmarks/targeted.py speed      # a million rows of 384 features, 1,000 examples; on an idle machine
"""

import argparse
import statistics
import time

import numpy as np
import torch

from curation.instances.targeted import TargetedSelector, best_ranks
from curation.recipes.mixture_of_experts import Domains
from curation.recipes.text_classification.text_embeddings import MINILM, embeddings

ROWS, EXAMPLES = 800, 64  # of each domain, and of the target


def domains() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """MiniLM embeddings of pieces of 256 bytes, and their domains: the first of each are for examples."""
    data = Domains("manual_pages", length=256, batch_size=64, single_domain=False, seed=0)
    data.setup("fit")
    texts: dict[int, list[str]] = {i: [] for i in range(len(data.names))}
    for batch in data.train_dataloader():
        for piece, domain in zip(batch["input_ids"], batch["domain"].tolist(), strict=True):
            if len(texts[domain]) < ROWS + EXAMPLES:
                texts[domain].append(bytes(piece.tolist()).decode("utf-8", "replace"))
        if min(map(len, texts.values())) == ROWS + EXAMPLES:
            break
    x = embeddings([text for part in texts.values() for text in part], MINILM, 64).numpy()
    return x.reshape(len(texts), ROWS + EXAMPLES, -1), np.repeat(np.arange(len(texts)), ROWS), data.names


def precision() -> None:
    """Precision of the kept rows; as many are kept as the target has."""
    x, y, names = domains()
    pool = x[:, EXAMPLES:].reshape(-1, x.shape[-1])
    for i, name in enumerate(names):
        kept = TargetedSelector(0.1, targets=x[i, :EXAMPLES]).fit(pool).sample_indices_
        print(f"{name:24} the kept 10 % of {len(pool):,}: precision {(y[kept] == i).mean():.3f}", flush=True)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(5):
        three = rng.choice(len(names), 3, replace=False)
        examples = np.concatenate([x[i, rng.choice(EXAMPLES, 21, replace=False)] for i in three])
        share = 3 / len(names) * 0.8
        by_rank = TargetedSelector(share, targets=examples).fit(pool).sample_indices_
        by_mean = np.argsort(-(pool @ examples.mean(0)), kind="stable")[: len(by_rank)]
        shares = [np.isin(y[rows], three).mean() for rows in (by_rank, by_mean)]
        least = [min((y[rows] == i).mean() for i in three) for rows in (by_rank, by_mean)]
        found.append([*shares, *least])
        print(f"three domains: precision {shares[0]:.3f}, by the centroid {shares[1]:.3f}; of the domain with the "
              f"least {least[0]:.3f} and {least[1]:.3f}", flush=True)  # fmt: skip
    print("means", np.mean(found, 0).round(3).tolist())


def speed(rows: int = 1_000_000, repeats: int = 5) -> None:
    """Best ranks, the product of matrices alone in fp32, and faiss, in turn."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rng = np.random.default_rng(0)
    pool, examples = (rng.standard_normal((n, 384), dtype=np.float32) for n in (rows, 1000))
    for x in (pool, examples):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    depth = 4 * rows // 10 // 1000
    index = faiss.IndexFlatIP(384)
    index.add(pool)
    queries = torch.from_numpy(examples)
    took: dict[str, list[float]] = {"best_ranks": [], "product": [], "faiss": []}
    for _ in range(repeats):
        start = time.perf_counter()
        best, _ = best_ranks(pool, examples, depth)
        took["best_ranks"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for part in torch.from_numpy(pool).split(4096):
            _ = part @ queries.T
        took["product"].append(time.perf_counter() - start)
        start = time.perf_counter()
        _, found = index.search(examples, depth)
        took["faiss"].append(time.perf_counter() - start)
    expected = np.full(rows, depth + 1)
    np.minimum.at(expected, found.ravel(), np.tile(np.arange(1, depth + 1), len(examples)))
    same = (np.where(expected <= depth, expected, 0) == best).mean()
    print(f"{torch.get_num_threads()} threads, depth {depth}, equal ranks {same:.6f}")
    for name, seconds in took.items():
        ratios = [a / b for a, b in zip(took["faiss"], seconds, strict=True)]
        print(f"{name:12} {statistics.median(seconds):6.2f} s; faiss takes {statistics.median(ratios):.2f} "
              f"[{min(ratios):.2f}, {max(ratios):.2f}] times as long")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("precision", "speed"))
    {"precision": precision, "speed": speed}[parser.parse_args().what]()
