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
from curation.recipes.targeted.target_texts import byte_features
from curation.recipes.text_classification.text_embeddings import MINILM, embeddings

ROWS, EXAMPLES = 800, 64  # of each domain, and of the target
AGREE = (1, 2, 4, 8, 16)


def domains() -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Features of pieces of 256 bytes by two embedders, and their domains: the first of each are for examples."""
    data = Domains("manual_pages", length=256, batch_size=64, single_domain=False, seed=0)
    data.setup("fit")
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(data.names))}
    for batch in data.train_dataloader():
        for piece, domain in zip(batch["input_ids"], batch["domain"].tolist(), strict=True):
            if len(found[domain]) < ROWS + EXAMPLES:
                found[domain].append(piece)
        if min(map(len, found.values())) == ROWS + EXAMPLES:
            break
    pieces = torch.stack([piece for part in found.values() for piece in part])
    texts = [bytes(piece.tolist()).decode("utf-8", "replace") for piece in pieces]
    minilm = embeddings(texts, MINILM, 64).numpy()
    features = {"MiniLM": minilm, "MiniLM, centred": minilm - minilm.mean(0), "bytes": byte_features(pieces.byte())}
    shape = (len(found), ROWS + EXAMPLES, -1)
    return {name: x.reshape(shape) for name, x in features.items()}, np.repeat(np.arange(shape[0]), ROWS), data.names


def precision() -> None:
    """Precision of the kept rows; as many are kept as the target has."""
    found, y, names = domains()
    print("of", ", ".join(names))
    for embedder, x in found.items():
        pool = x[:, EXAMPLES:].reshape(-1, x.shape[-1])
        for rule in (*AGREE, "centroid"):
            one = [(y[kept(pool, x[i, :EXAMPLES], 0.1, rule)] == i).mean() for i in range(len(names))]
            rng, three = np.random.default_rng(0), []
            for _ in range(5):
                of = rng.choice(len(names), 3, replace=False)
                examples = np.concatenate([x[i, rng.choice(EXAMPLES, 21, replace=False)] for i in of])
                domain = y[kept(pool, examples, 3 / len(names) * 0.8, rule)]
                three.append([np.isin(domain, of).mean(), min((domain == i).mean() for i in of)])
            shares = " ".join(f"{share:.2f}" for share in one)
            of_three, least = np.mean(three, 0)
            print(f"{embedder:16} {rule!s:>8}  {shares}  mean {np.mean(one):.3f}; of three {of_three:.3f}, the least "
                  f"{least:.3f}", flush=True)  # fmt: skip


def kept(pool: np.ndarray, examples: np.ndarray, budget: float, rule: int | str) -> np.ndarray:
    """What stays by the best rank of so many examples, or by their mean."""
    if rule == "centroid":
        unit = examples / np.linalg.norm(examples, axis=1, keepdims=True)
        return TargetedSelector(budget, targets=unit.mean(0, keepdims=True)).fit(pool).sample_indices_
    return TargetedSelector(budget, targets=examples, agree=int(rule)).fit(pool).sample_indices_


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
