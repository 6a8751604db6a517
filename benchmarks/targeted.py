"""Selection for a target: precision on eight domains of text, and its time beside a faiss flat search.

python benchmarks/targeted.py precision  # which rows of eight domains are kept for examples of one, and of three
python benchmarks/targeted.py speed      # a million rows of 384 features, 1,000 examples; on an idle machine
python benchmarks/targeted.py stream FOLDER  # ten million rows in Parquet files, 8 GB, which it writes to FOLDER
python benchmarks/targeted.py chat FOLDER  # SmolLM2 cut to 2 layers on what is kept of chat for GSM8K; FOLDER has its
                                           # train.jsonl and test.jsonl
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from curation.batch import SampleIds
from curation.evaluation.statistics import paired_interval
from curation.instances import FeatureShards, contaminated
from curation.instances.targeted import TargetedSelector, best_ranks
from curation.recipes.chat import Conversations, SupervisedFineTuning
from curation.recipes.chat.conversations import encode, load
from curation.recipes.mixture_of_experts import Domains
from curation.recipes.pretrained import load_tokenizer
from curation.recipes.smollm2 import SMOLLM2
from curation.recipes.targeted.target_texts import byte_features
from curation.recipes.text_classification.labelled_texts import FAMILIES
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
    """Precision of the kept rows, as many as the target has, and what a classifier on a sample shares with them."""
    found, y, names = domains()
    print("of", ", ".join(names))
    for embedder, x in found.items():
        pool = x[:, EXAMPLES:].reshape(-1, x.shape[-1])
        whole: dict[Any, list[np.ndarray]] = {}
        for rule, part in [
            *((rule, 1) for rule in (*AGREE, "centroid")),
            *((rule, k) for rule in (1, 8) for k in (2, 4)),
        ]:
            found_rows = [kept(pool, x[i, :EXAMPLES], 0.1, rule, part) for i in range(len(names))]
            one = [(y[rows] == i).mean() for i, rows in enumerate(found_rows)]
            rng, three = np.random.default_rng(0), []
            for _ in range(5):
                of = rng.choice(len(names), 3, replace=False)
                examples = np.concatenate([x[i, rng.choice(EXAMPLES, 21, replace=False)] for i in of])
                found_rows.append(kept(pool, examples, 3 / len(names) * 0.8, rule, part))
                domain = y[found_rows[-1]]
                three.append([np.isin(domain, of).mean(), min((domain == i).mean() for i in of)])
            shares = " ".join(f"{share:.2f}" for share in one)
            of_three, least = np.mean(three, 0)
            whole.setdefault(rule, found_rows)
            shared = [np.isin(a, b).mean() for a, b in zip(found_rows, whole[rule], strict=True)]
            shared_one, shared_three = np.mean(shared[: len(names)]), np.mean(shared[len(names) :])
            print(f"{embedder:16} {rule!s:>8}, of 1 / {part} {shares}  mean {np.mean(one):.3f}; of three "
                  f"{of_three:.3f}, the least {least:.3f}; shared with the ranking of all {shared_one:.3f}, of three "
                  f"{shared_three:.3f}", flush=True)  # fmt: skip


def kept(pool: np.ndarray, examples: np.ndarray, budget: float, rule: int | str, part: int = 1) -> np.ndarray:
    """What stays by the best rank of so many examples, or by their mean; of one row in ``part`` by a classifier."""
    if rule == "centroid":
        unit = examples / np.linalg.norm(examples, axis=1, keepdims=True)
        return TargetedSelector(budget, targets=unit.mean(0, keepdims=True)).fit(pool).sample_indices_
    return (
        TargetedSelector(budget, targets=examples, agree=int(rule), sample=len(pool) // part)
        .fit(pool)
        .sample_indices_
    )


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


def stream(folder: str, rows: int = 10_000_000, sample: int = 1_000_000, wide: int = 384) -> None:
    """Seconds and memory of a pool in files: of which a sample is ranked, and all of which is."""
    import resource

    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, group = np.random.default_rng(0), 62_500
    examples = rng.standard_normal((1000, wide), dtype=np.float32)
    block = rng.standard_normal((group, wide), dtype=np.float32).astype(np.float16)
    for number, start in enumerate(range(0, rows, 16 * group)):
        schema = pa.schema([("features", pa.list_(pa.float16(), wide))])
        with pq.ParquetWriter(f"{folder}/{number:03}.parquet", schema, compression="none") as file:
            for _ in range(start, min(rows, start + 16 * group), group):  # columns and signs drawn anew: other rows
                x = block[:, rng.permutation(wide)] * rng.choice([-1, 1], wide).astype(np.float16)
                lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), wide)
                file.write_table(pa.table({"features": lists}, schema=schema), row_group_size=group)
    pool = FeatureShards(folder)

    def memory() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, on Linux

    print(
        f"{len(pool):,} rows, {torch.get_num_threads()} threads; files written, {memory():.2f} GiB at most",
        flush=True,
    )
    for ranked in (sample, rows):
        selector = TargetedSelector(0.1, targets=examples, sample=ranked).fit(pool)
        print(f"{ranked:,} ranked: {selector.report_['seconds']:.0f} s, depth {selector.report_['depth']}, "
              f"{memory():.2f} GiB at most so far", flush=True)  # fmt: skip


CHAT, PER_FAMILY, PROBLEMS, HELD = 1200, 30, 125, (32, 64, 1)  # rows of a pool; of each source in validation
STEPS, BATCH, TOKENS, RATE = 24, 8, 256, 2e-3


def sources(gsm8k: str) -> dict[str, list[Any]]:
    """Conversations of chat, of reasoning-gym's families, and of the problems to learn and to test."""
    from reasoning_gym.factory import create_dataset

    def pairs(rows: Any) -> list[Any]:
        roles = {"question": "user", "answer": "assistant"}
        return [[{"role": roles[name], "content": row[name]} for name in roles] for row in rows]

    chats = load("chitchat")
    _, first = np.unique(chats.with_format("numpy")["conversation"][:], return_index=True)
    found = {name: load(f"{gsm8k}/{name}.jsonl")["messages"][:] for name in ("train", "test")}
    tests = [problem[0]["content"] for problem in found["test"]]
    found["chat"] = chats.select(first)["messages"][:]
    for family in FAMILIES:
        found[family] = pairs(list(create_dataset(family, size=400, seed=0)))
    for name, rows in found.items():
        if name != "test":
            share = contaminated([row[0]["content"] for row in rows], tests).mean()
            print(f"{name}: {share:.4f} share 13 words with a test problem") if share else None
    del found["gsm_symbolic"], found["propositional_logic"]  # a third of its questions do; it has no answers
    return found


def features(rows: list[Any]) -> dict[str, np.ndarray]:
    """Features of conversations: MiniLM's, and hashed 3-grams of bytes."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    texts = ["\n".join(message["content"] for message in row) for row in rows]
    grams = HashingVectorizer(
        analyzer="char", ngram_range=(3, 3), n_features=2048, norm=None, alternate_sign=False
    ).transform(texts)
    return {
        "MiniLM": embeddings(texts, MINILM, 64).numpy(),
        "3-grams": TfidfTransformer(sublinear_tf=True).fit_transform(grams).toarray().astype(np.float32),
    }


def arms(found: dict[str, np.ndarray], domain: np.ndarray, examples: int, seed: int) -> dict[str, np.ndarray]:
    """The rows of each arm: at random; by best rank and by 8 that agree, and at random of the domains of each."""
    draw, size = np.random.default_rng(seed), len(domain)
    rows = {"random": draw.choice(size, round(size / 10), replace=False)}
    for embedder, agree in (("MiniLM", 1), ("3-grams", 8)):
        x = found[embedder][np.r_[:size, -examples:0]]
        x = x - x.mean(0)
        best = TargetedSelector(0.1, x[size:], agree=agree).fit(x[:size]).sample_indices_
        rows[f"{embedder}, {agree}"] = best
        names, counts = np.unique(domain[best], return_counts=True)
        same = [
            draw.choice(np.flatnonzero(domain == i), k, replace=False) for i, k in zip(names, counts, strict=True)
        ]
        rows[f"domains of {embedder}, {agree}"] = np.concatenate(same)
    return rows


def chat(gsm8k: str, seeds: int = 3, first: int = 0) -> None:
    """Losses on held-out problems, chat and reasoning-gym, of a pool without such problems and of one with a few."""
    import datasets
    from lightning.pytorch import Trainer, seed_everything

    def encoded(rows: list[Any]) -> Any:
        return encode(datasets.Dataset.from_dict({"messages": rows}), tokenizer, TOKENS)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    found, tokenizer = sources(gsm8k), load_tokenizer(SMOLLM2)
    families = [name for name in FAMILIES if name in found]
    module = SupervisedFineTuning(SMOLLM2, num_layers=2, lr=RATE, warmup_steps=5, schedule="linear")
    module.configure_model()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    losses: dict[tuple[int, str], list[list[float]]] = {}
    for seed in range(first, first + seeds):
        draw = np.random.default_rng(seed)
        rows = {name: [part[i] for i in draw.permutation(len(part))] for name, part in found.items()}
        tests = {"GSM8K": rows["test"][: HELD[0]], "chat": rows["chat"][: HELD[1]],
                 "reasoning-gym": [row for name in families for row in rows[name][: HELD[2]]]}  # fmt: skip
        held = {name: encoded(part) for name, part in tests.items()}
        parts = [rows["chat"][HELD[1] :][:CHAT], *(rows[name][HELD[2] :][:PER_FAMILY] for name in families)]
        parts.append(rows["train"][EXAMPLES:][:PROBLEMS])
        pool = [row for part in parts for row in part]
        domain = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        made = features(pool + rows["train"][:EXAMPLES])
        for problems in (0, PROBLEMS):
            size = len(pool) - PROBLEMS + problems
            for name, kept in arms(made, domain[:size], EXAMPLES, seed).items():
                seed_everything(seed, verbose=False)
                data = Conversations(tokenizer=SMOLLM2, batch_size=BATCH)
                data.train = SampleIds(encoded([pool[i] for i in kept]))
                module.load_state_dict(weights)
                trainer = Trainer(max_steps=STEPS, max_epochs=-1, limit_val_batches=0, accelerator="cpu", **quiet)
                trainer.fit(module.train(), data.train_dataloader())
                found_losses = []
                for data.val in held.values():
                    trainer = Trainer(accelerator="cpu", **quiet)
                    result = trainer.validate(module, data.val_dataloader(), verbose=False)
                    found_losses.append(result[0]["val_loss"])
                losses.setdefault((problems, name), []).append(found_losses)
                said = ", ".join(f"{of} {loss:.3f}" for of, loss in zip(held, found_losses, strict=True))
                print(f"seed {seed}, {problems} problems in {size}, {name}: of {len(kept)} "
                      f"{(domain[kept] == len(parts) - 1).sum()} problems, {(domain[kept] == 0).sum()} chats; {said}",
                      flush=True)  # fmt: skip
    for (problems, name), of_seeds in losses.items():
        all_rows, random = np.array(of_seeds), np.array(losses[problems, "random"])
        gaps = [paired_interval(column.tolist()) for column in (all_rows - random).T] if seeds > 1 else []
        print(f"{problems} problems, {name}: {all_rows.mean(0).round(3)}, minus random "
              + ", ".join(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in gaps))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("precision", "speed", "stream", "chat"))
    parser.add_argument("folder", nargs="?")
    given = parser.parse_args()
    globals()[given.what](*filter(None, [given.folder]))
