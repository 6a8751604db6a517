"""Whatever comes in: a result that keeps its promises, or a ValueError or TypeError that says what was wrong.

`make test` runs a few examples; `make fuzz` 40,000 others, and says how many of each. Both always run the same.
"""

import functools
import math
import os
import random
import sys
import tempfile
from collections import Counter
from numbers import Real
from pathlib import Path

import numpy as np
import pytest
import torch
from contract.registry import CALLBACKS
from generated import COLUMNS, CONTAINERS, DTYPES, MOST, Tiny, build, column, constant, table, tag, with_ids
from helpers import trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interruptions import draw_run, fit, last_checkpoint
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import TwoRanks
from torch.utils.data import DataLoader
from twins import tags
from unequal import Fit, Rows, gather, gathered, train, trained

from curation import instances
from curation.batch import (
    Columns,
    batch_size,
    copied,
    leaves,
    refuse_samples,
    split_sample_ids,
    take_rows,
    trim_padding,
)
from curation.callbacks import ExactResume, HardBatchTraining, SampleRecord, UniformSelection
from curation.experts import load_balancing as lb
from curation.online import hard_samples as hard
from curation.online.top import keep_count, top_rows
from curation.online.utility_diversity import UtilityDiversityScorer
from curation.records.ledger import Ledger, LedgerWriter
from curation.records.score_store import ScoreStore
from curation.rollouts.advantages import advantages, loss_weights
from curation.rollouts.allocation import DifficultyMemory, EqualTreatment, HardnessWeighted, Neyman, Uniform, plan
from curation.samplers.concept_aware import ConceptAwareSampler, ConceptIndex
from curation.samplers.hard_batches import HardBatchSampler
from curation.samplers.subset import SubsetSampler

settings.register_profile("fixed", deadline=None, database=None, derandomize=True)
settings.register_profile("nightly", deadline=None, database=None, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fixed")


def fuzz(few, many, *strategies):
    """Test with so many random arguments."""
    examples, checks = many if PROFILE == "nightly" else few, list(HealthCheck)
    how = settings(settings.get_profile(PROFILE), max_examples=examples, suppress_health_check=checks)
    return lambda test: how(given(*strategies)(test))


def answer(valid, call, *said):
    """What a call gives; if its arguments are not valid it must refuse them, and say these things."""
    if valid:
        return call()
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert [text for text in map(str, said) if text not in str(caught.value)] == []
    return None


def number(value, low, high=sys.float_info.max, kind=Real):
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


pick, lists = st.sampled_from, st.lists
FLOATING, SIZE, FEW, SEED = pick(DTYPES[3:]), st.integers(1, MOST), st.integers(1, 3), st.integers(0, 2**63 - 1)
NUMBERS = st.one_of(st.floats(width=32), pick([0.0, 1.0, 1e-45, 3e38, math.nan, math.inf, -math.inf]))
ANYTHING = st.one_of(st.floats(0, 1), st.floats(), st.integers(), SEED, pick([True, 0, 1, 2, 2**63, None, "0.5"]))
BROKEN, FRACTION = pick([math.nan, math.inf]), st.floats(0, 1, exclude_min=True)

CONSTANTS = [None, "text", b"", 0.5, math.nan, {}, [], (), ["a"] * 40, torch.Size([2]), np.zeros(40), torch.tensor(2)]
DISAGREE = [lambda rows: table(torch.int64, (), [*rows, 0]), lambda rows: [torch.zeros(40 + i) for i in rows]]
TABLES = st.builds(functools.partial, st.just(table), pick(DTYPES), pick([(), (2,), (0,), (1, 3), (2, 0, 1)]))
COLUMN = st.builds(functools.partial, st.just(column), st.integers(0, len(COLUMNS) - 1))
FIELDS = st.one_of(TABLES, COLUMN, st.builds(functools.partial, st.just(constant), pick(CONSTANTS)))


def inside(fields):
    return st.builds(functools.partial, st.just(build), pick(list(CONTAINERS)), fields, fields)


BATCHES = inside(st.recursive(FIELDS, inside, max_leaves=4))


@fuzz(150, 4000, BATCHES, st.integers(0, MOST), lists(st.integers(-1, MOST), max_size=5), pick(DISAGREE))
def test_rows_of_batches(make, size, rows, other):
    every = list(range(size))
    batch, valid = make(every), all(0 <= row < size for row in rows)
    if answer(size > 0, lambda: batch_size(batch), "no rows"):
        assert batch_size(batch) == size
        kept = answer(valid, lambda: take_rows(batch, tag(rows)), "`rows`", f"[0, {size})", max(rows, default=0))
        assert not valid or repr(kept) == repr(make(rows))
        assert trim_padding(batch) is batch
        columns, copy = Columns(), copied(batch)
        columns.observe(batch)
        alike = len({path for path, _ in leaves(batch)}) < len(leaves(batch))  # the keys 0 and "0"
        assert not valid or alike or repr(take_rows(batch, tag(rows), columns)) == repr(make(rows))
        assert repr(copy) == repr(batch)
        for (_, leaf), (_, same) in zip(leaves(batch), leaves(copy), strict=True):
            assert leaf is not same or not isinstance(leaf, (torch.Tensor, np.ndarray))
        answer(False, lambda: batch_size({0: batch, "0": other(every)}), "disagree on the number", f"has {size}")
    assert repr(batch) == repr(make(every))


SAMPLE_SHAPES = st.lists(pick([(), (2,), (5,), (5, 2), (16,), (3, 4, 4)]), min_size=2, max_size=4)


@fuzz(60, 2000, SAMPLE_SHAPES, st.integers(2, 8), st.booleans(), pick([list, tuple]))
def test_lists_of_samples(shapes, size, named, kind):
    """Collated, each keeps its rows whole; as a list, they are refused: no dimension of a sample is one of rows."""
    samples = [[torch.full(shape, float(i)) for shape in shapes] for i in range(size)]
    collated = [torch.stack(field) for field in zip(*samples, strict=True)]
    for field in take_rows(collated, tag([size - 1])):
        assert bool((field == size - 1).all())
    batch = kind(dict(enumerate(sample)) if named else sample for sample in samples)
    lengths = {shape[0] for shape in shapes if shape}

    def rows():
        rows = batch_size(batch)
        refuse_samples(batch, rows, size)
        return rows

    # All the same, equal samples may look like views of as many rows as they have entries.
    looks_like_views = () not in shapes and lengths == {size}
    undecided = () not in shapes and len(lengths) == 1 and lengths < set(range(size)) and size <= 4
    if looks_like_views or undecided:
        assert rows() in lengths
    else:
        answer(False, rows)


ID = st.one_of(st.integers(0, 9), pick([2**31, 2**53 + 1, 2**63 - 1]))
BAD = {kind: [-1, -(2**63), 2**63, 2**80, 1.0, math.nan, True, None, "7"] for kind in (list, tuple)}
BAD |= {torch.int64: [-1, -(2**63)], torch.uint64: [2**63, 2**64 - 1]}


@fuzz(150, 1500, lists(ID, max_size=4), pick([*BAD, torch.bool, *DTYPES[3:]]), st.booleans(), SEED)
def test_ids(ids, kind, mapping, seed):
    bad = BAD.get(kind, [1.0])
    given = [*ids, *([bad[seed // 2 % len(bad)]] if seed % 2 else [])]
    given = torch.tensor(given, dtype=kind) if isinstance(kind, torch.dtype) else kind(given)
    batch = {"x": "x", "sample_id": given} if mapping else ["x", {"sample_id": given}]
    got = answer(kind in BAD and not seed % 2, lambda: split_sample_ids(batch), "`sample_id`")
    assert got is None or repr(got) == repr(({"x": "x"} if mapping else ["x"], tag(ids)))


SELECTIONS = [name for name, entry in CALLBACKS.items() if entry.selects and not entry.modules and entry.joined == 1]
LOGITS = lists(st.tuples(*[st.floats(-30, 30, width=16)] * 2), min_size=1, max_size=MOST)


@pytest.mark.parametrize("name", SELECTIONS)
@fuzz(4, 400, BATCHES, LOGITS, st.sets(SIZE), BROKEN, FLOATING, st.integers(1, 8), FRACTION, SEED)
def test_fits(name, make, logits, broken, value, dtype, size, keep, seed):
    kind, entry, n, batches = make.args[0], CALLBACKS[name], len(logits), []
    logits, broken = torch.tensor(logits, dtype=dtype), {i for i in broken if i < n}
    logits[sorted(broken), 0] = value
    has_ids = kind in ("dict", "list", "tuple")

    def collate(rows):
        batches.append(rows)
        return with_ids(make, rows) if has_ids else make(rows)

    needs = {"concepts": ConceptIndex.from_lists(map(tags, range(1, n + 1)))} if "concepts" in entry.arguments else {}
    needs |= {"drop": 0.0} if entry.arguments.get("rule") == "drop_high" else {}  # else `keep` would have to be small
    callbacks = [entry.make(keep=keep, seed=seed, **needs), *([SampleRecord()] if has_ids else [])]
    module, draw = Tiny(logits, make), torch.Generator().manual_seed(seed)
    loader = DataLoader(range(n), size, shuffle=True, generator=draw, collate_fn=collate)
    valid = has_ids or "concepts" not in needs or keep == 1
    answer(valid, lambda: trainer(*callbacks, max_epochs=1).fit(module, loader), "needs sample ids")
    k = keep_count(keep, min(size, n))
    for candidates, kept in zip(batches, module.got, strict=True) if valid else []:
        assert kept == [i for i in candidates if i in kept]  # in the order of the batch
        assert len(kept) == min(k, len(candidates))
        if entry.cls.has_scores and keep < 1:
            assert len(broken & set(kept)) == max(0, len(kept) - len(set(candidates) - broken))
    if valid and has_ids:
        store, times = callbacks[1].store, Counter(i for kept in module.got for i in kept)
        assert [store.seen.tolist(), store.kept.tolist()] == [[1] * n, [times[i] for i in range(n)]]


ORDERS = {
    "shuffled": lambda n, size: None,
    "subset": lambda n, size: SubsetSampler(range(n), range(0, n, 2), seed=1),
    "hard": lambda n, size: HardBatchSampler(range(n), size, seed=1),
    "concepts": lambda n, size: ConceptAwareSampler(
        ConceptIndex.from_lists(map(tags, range(1, n + 1))), size, min(n, 2 * size), visit_penalty=0.1
    ),
}


@fuzz(6, 800, pick(list(ORDERS)), FEW, st.integers(3, MOST), FEW, FEW, st.booleans(), SEED)
def test_runs_killed_anywhere_go_on(order, size, n, accumulate, epochs, selects, stop):
    def fit(stop=None, folder=None, **resume):
        seed_everything(7 if resume else 1, verbose=False)
        sampler, module = ORDERS[order](n, size), Tiny(torch.zeros(MOST, 2), tag, stop)
        loader = DataLoader(range(n), size, sampler=sampler, shuffle=None if sampler else True)
        callbacks = [ExactResume(), *([HardBatchTraining()] if order == "hard" else [])]
        callbacks += [UniformSelection(keep=0.5)] if selects else []
        callbacks += [ModelCheckpoint(folder, every_n_train_steps=1)] if folder else []
        options = {"max_epochs": epochs, "accumulate_grad_batches": accumulate, "enable_checkpointing": bool(folder)}
        trainer(*callbacks, **options).fit(module, loader, **resume)
        return module

    whole, done = fit(), 0
    stop %= len(whole.got)
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(InterruptedError):
            fit(stop, folder)
        for saved in Path(folder).glob("*.ckpt"):
            done = torch.load(saved, weights_only=False)["callbacks"]["ExactResume"]["batches"]
            again = fit(ckpt_path=saved)
            assert (again.got, again.weight) == (whole.got[done:], whole.weight)
    assert stop - done < accumulate


@fuzz(100, 1500, pick(SELECTIONS), ANYTHING, ANYTHING, SIZE)
def test_arguments_of_selections(name, keep, seed, size):
    kept = number(keep, 5e-324, 1)
    said = ["`seed`", repr(seed)] if kept else ["`keep`", repr(keep)]
    valid = kept and number(seed, 0, 2**63 - 1, int)
    none = {"drop": 0.0} if CALLBACKS[name].arguments.get("rule") == "drop_high" else {}
    made = answer(valid, lambda: CALLBACKS[name].make(keep=keep, seed=seed, **none), *said)
    assert made is None or 1 <= keep_count(made.keep, size) <= size


def draw(rule, scores, pool, value, k, uniform):
    """The rows of a rule, and weights that are 0 for what is not to be drawn."""
    if rule in ("top", "importance"):
        return (top_rows(scores, k), scores.isfinite()) if rule == "top" else hard.priority_sample(scores, k, uniform)
    if rule == "cdf":
        return hard.pareto_sample(p := hard.cdf_power(scores, torch.cat([pool, scores]), value), k, uniform), p
    return hard.successive_sample(w := hard.rank_log_weights(scores, value), k, uniform), w.isfinite()


SCORES, RULES = lists(NUMBERS, min_size=1, max_size=9), ["top", "rank", "cdf", "importance"]


@fuzz(300, 5000, pick(RULES), SCORES, SCORES, FLOATING, st.floats(), st.integers(-1, 10), SEED)
def test_choices(rule, scores, pool, dtype, parameter, k, seed):
    scores, pool, n = torch.tensor(scores).to(dtype), torch.tensor(pool).to(dtype), len(scores)
    scores = scores.abs() if rule == "importance" else scores
    before, uniform = repr(scores), torch.from_numpy(np.random.default_rng(seed).random(n))
    uniform[seed % n] *= seed % 3 > 0  # 0 is in the range, too
    name, least = {"rank": ("`pressure`", 1), "cdf": ("`beta`", 0)}.get(rule, ("", math.nan))
    fits = not name or number(parameter, least)
    got = answer(fits and k >= 0, lambda: draw(rule, scores, pool, parameter, k, uniform), "`k`" if fits else name)
    assert repr(scores) == before
    if got is not None:
        (rows, weights), finite = got, scores.isfinite()
        assert rows.tolist() == sorted(set(rows.tolist()) & set(range(n)))
        assert [len(rows), int(finite[rows].sum())] == [min(k, n), min(k, int(finite.sum()))]
        assert weights.isfinite().all()
        assert torch.equal(weights > 0, finite if rule != "importance" else torch.ones(len(rows)).bool())
        tau = hard.variance_reduction(scores.abs().float())
        assert 1 <= tau < (math.inf if len(scores.abs().unique()) > 1 else 1.001)


@fuzz(40, 2000, pick(["length", "none", "paper"]), FLOATING, SIZE, st.sets(SIZE), BROKEN, SEED)
def test_utility_and_diversity(normalization, dtype, n, broken, value, seed):
    generator, scorer = torch.Generator().manual_seed(seed), UtilityDiversityScorer(1.0, normalization, seed)
    length, width, bad = 1 + seed % 5, 1 + seed % 7, sorted(i for i in broken if i < n)
    for _ in range(2):
        outputs = (torch.randn(n, length, width, generator=generator) * 10.0 ** (seed % 7 - 3)).to(dtype)
        mask = torch.rand(n, length, generator=generator) < 0.7
        outputs[bad, 0], mask[bad, 0] = value, True
        given = (outputs, mask) if seed % 2 else (outputs[:, 0], mask[:, 0])
        before, scores = repr(given), scorer.score(*given)
        assert repr(given) == before
        labelled = given[1].view(n, -1).any(1).tolist()
        scored = [i not in bad and (normalization != "paper" or labelled[i]) for i in range(n)]
        assert scores.isfinite().tolist() == scored
        scorer.remember(scorer.sketches, scorer.moments)


IDS = lists(pick([0, 1, 2, 5, 5, -1, -2, 2**40, 2**63 - 1]), min_size=1, max_size=5)


@fuzz(60, 2000, IDS, pick([torch.int64, torch.int32, torch.float64]), FEW, st.booleans(), FEW)
def test_ids_of_records(ids, dtype, length, none, size):
    n, store = max(len(ids), length), ScoreStore(3 * size)
    size, shaped = 3 * size, dtype == torch.int64 and n == len(ids)
    given = torch.tensor(ids).to(dtype), torch.full((n,), math.nan if none else 0.5), torch.ones(n)
    valid = shaped and -1 <= min(ids) <= max(ids) < size
    answer(valid, lambda: store.update(*given, 3), "sample id" if shaped else "`ids`")
    assert store.seen.tolist() == [ids.count(i) * valid for i in range(size)]
    assert store.steps.tolist() == [3 if i in ids and valid and not none else -1 for i in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        writer = LedgerWriter(folder)
        answer(shaped, lambda: writer.append(0, *given, torch.ones(n)), "sample_ids")
        writer.close()
        valid = 0 <= min(ids) <= max(ids) < (size if none else 2**31)
        counts = shaped and answer(valid, lambda: Ledger(folder).counts(size if none else None), "`size`", max(ids))
        assert not counts or {i: n for i, n in enumerate(counts[0]) if n} == Counter(ids)


CONCEPTS = lists(lists(st.integers(0, 9), max_size=3), min_size=1, max_size=40)
WEIGHTS = st.dictionaries(st.integers(0, 9), st.one_of(st.floats(0, 1e6), NUMBERS), max_size=2)
TARGETS = st.one_of(pick(["uniform", "proportional"]), pick(["else", None, 3]), WEIGHTS)


@fuzz(60, 4000, CONCEPTS, st.integers(1, 4), st.integers(1, 9), FEW, TARGETS, pick([0, 0.5]), SEED)
def test_batches_of_concepts(concepts, size, candidates, ranks, targets, penalty, seed):
    index, named = ConceptIndex.from_lists(concepts), {name for names in concepts for name in names}
    fits, weighs = size <= candidates <= len(concepts), targets in ("uniform", "proportional")
    if isinstance(targets, dict):
        weighs = named >= set(targets) and all(number(w, 0) for w in targets.values()) and any(targets.values())

    def sampler(ranks, rank=0, of=1):
        kind = type("Ranked", (ConceptAwareSampler,), {"_place": (rank, of)})
        made = kind(index, size * ranks, candidates * ranks, "diversity", targets, penalty, seed)
        made.set_epoch(seed % 3)
        return made

    valid, said = (
        fits and named and weighs,
        "`super_batch_size`" if not fits else "`targets`" if named else "`concepts`",
    )
    if not answer(valid, lambda: sampler(1), said):
        return
    enough = candidates * ranks <= len(concepts)
    rows = answer(enough, lambda: list(sampler(1, ranks - 1, ranks)), "`super_batch_size`", candidates)
    if enough:
        batches = np.array(list(sampler(ranks))).reshape(-1, size * ranks)
        assert rows == batches[:, ranks - 1 :: ranks].flatten().tolist()
        assert len(np.unique(batches)) == len(sampler(ranks)) == batches.size
        resumed, done = sampler(1, ranks - 1, ranks), seed % (len(batches) + 1)
        resumed.load_state_dict(sampler(1, 0, ranks).state_dict(done))
        assert list(resumed) == rows[done * size :]


SCHEDULES = [Uniform(20), EqualTreatment(), HardnessWeighted(std=True), Neyman("logit"), Neyman("accuracy")]
ROLLOUTS = st.one_of(st.integers(1, 9), st.integers(-1, 9), pick([1.5, None]))


@fuzz(100, 4000, pick(SCHEDULES), lists(st.one_of(st.floats(0, 1), NUMBERS), max_size=4), ROLLOUTS, ANYTHING)
def test_plans(schedule, successes, n, budget):
    budget = budget if number(budget, -1e9, 1e9) or budget != budget else None
    counted, memory = number(n, 1, 9, int), DifficultyMemory()
    seen = counted and all(number(s, 0, n) for s in successes)
    pays = seen and (budget is None or budget >= n * len(successes))
    said = "`budget`" if seen else "must sum to" if counted else "`n`"
    extra = answer(pays, lambda: plan(schedule, np.array(successes), n, budget), said)
    if pays:
        assert extra.shape == (len(successes),)
        assert ((extra >= 0) & (extra <= schedule.cap(n))).all()
        assert budget is None or extra.sum() <= budget - n * len(successes)
    if counted:
        answer(seen, lambda: memory.update(range(len(successes)), successes, n), "must sum to")
        known = memory.successes(range(5), [0.5] * 5, n)
        assert len(memory.counts) == len(successes) * seen
        assert ((known >= 0) & (known <= n)).all()


BASELINE, NORMALIZER = pick(["centred", "std", "rloo", "maxrl", "none"]), pick(["token", "rollout", "prompt"])
REWARDS = lists(st.tuples(st.integers(0, 4), st.one_of(st.floats(0, 1), st.floats(-1e30, 1e30), BROKEN)), max_size=8)


@fuzz(100, 2500, REWARDS, FLOATING, BASELINE, NORMALIZER, st.integers(1, 5))
def test_advantages(pairs, dtype, baseline, normalizer, size):
    rewards, of = torch.tensor([reward for _, reward in pairs]).to(dtype), tag([group for group, _ in pairs])
    right = [math.isfinite(r) and (baseline != "maxrl" or r >= 0) for r in rewards.tolist()]
    placed = all(group < size for group, _ in pairs)
    said = "`rewards`" if placed else "`groups`"
    got = answer(placed and all(right), lambda: advantages(rewards, of, size, baseline), said)
    if got is not None:
        assert got.isfinite().all()
        for group in range(size):
            own, mine = rewards[of == group], got[of == group].double()
            assert len(own.unique()) > 1 or not mine.any()
            assert baseline == "none" or abs(float(mine.sum())) <= 1e-5 * float(mine.abs().sum()) + 1e-40
        weights, whole = loss_weights(got, of, size, torch.ones_like(of), normalizer, 7)
        assert weights.isfinite().all()
        assert 0 <= float(whole) <= 7 * len(of)


@fuzz(
    60,
    4000,
    SIZE,
    st.integers(1, 6),
    FLOATING,
    pick(["softmax", "sigmoid", "sqrtsoftplus", "none", "else"]),
    FEW,
    BROKEN,
    SEED,
)
def test_experts(n, experts, dtype, scores, sequences, value, seed):
    generator = torch.Generator().manual_seed(seed)
    mask, logits = torch.rand(n, generator=generator) < 0.7, torch.rand(n, experts, generator=generator).to(dtype)
    indices = logits.topk(1 + seed % experts).indices.masked_fill(torch.rand(n, 1, generator=generator) < 0.1, -1)
    logits[:, 1:][:, seed % 2 :: 3] = -math.inf if scores != "none" else 0
    logits[~mask] = value  # whatever padding is
    logits.requires_grad_()
    p, counts = answer(scores != "else", lambda: lb.probabilities(logits, scores), "`scores`"), lb.expert_counts
    answer(False, lambda: counts(indices + experts + 1, experts, mask), "`indices`")
    answer(False, lambda: counts(indices, experts, torch.ones(n + 1).bool()), "`mask`", n + 1)
    counts = counts(indices, experts, mask)
    assert int(counts.sum()) == int((indices[mask] >= 0).sum())
    assert float(lb.expert_fractions(counts).sum()) == pytest.approx(float(counts.sum() > 0))
    loss = lb.z_loss(logits, mask)
    assert loss.isfinite()
    if p is not None:
        own = answer(n % sequences == 0, lambda: lb.sequence_loss(p, indices, sequences, mask), "`sequences`")
        assert own is None or 0 <= float(own) <= experts * 1.001
        loss = loss if own is None else loss + own
    loss.backward()
    assert logits.grad[mask].isfinite().all()


GRAPHS = ["multiview", "multilevel", "lsh", "minibatch", "hnsw", "exact"]
LABELS, BUDGET = lists(pick([0, 1, 7]), min_size=1, max_size=30), st.one_of(FRACTION, ANYTHING)
CRITERION, SELECT = pick(["ambiguity", "confidence", "margin", "attention"]), pick(["coverage", "rank", "threshold"])
POISON = pick([None, None, math.nan, math.inf, 1e36])


@pytest.mark.parametrize("name", ["random", "coverage", "edited", *GRAPHS])
@fuzz(12, 600, LABELS, st.integers(1, 60), BUDGET, CRITERION, SELECT, POISON, SEED)
def test_instances(name, y, k, budget, criterion, select, value, seed):
    X = np.random.default_rng(seed).integers(0, 3, (len(y), 1 + seed % 3)) * 10.0 ** (seed % 9 - 4)
    X = X.astype([np.float16, np.int64, np.float32, np.float64][seed % 4])
    value = value if seed % 4 > 1 else None
    X[seed % len(y), 0] = X[0, 0] if value is None else value
    graph = {"graph": name, "criterion": criterion, "select": select, "n_graphs": 2, "epochs": 1}
    selector = {
        "random": instances.StratifiedRandomSelector(budget, random_state=0),
        "coverage": instances.CoverageInstanceSelector(budget, n_neighbors=k, random_state=0),
        "edited": instances.EditedNearestNeighboursFilter(n_neighbors=k, random_state=0),
    }.get(name) or instances.GraphAttentionInstanceSelector(budget, n_neighbors=k, random_state=0, **graph)
    valid = name == "edited" or number(budget, 5e-324, 1)
    before, said = X.copy(), "`budget`" if value is None else "X"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instances.attention, "STEPS", 2)
        answer(valid and value is None, lambda: selector.fit(X, np.array(y)), said)
    np.testing.assert_array_equal(X, before)
    if valid and value is None:
        rows = selector.sample_indices_.tolist()
        assert rows == sorted(set(rows) & set(range(len(y)))) == sorted(selector.ranking_)
        assert {y[row] for row in rows} == set(y)
        assert name == "edited" or len(rows) == max(round(budget * len(y)), len(set(y)))
        assert np.isfinite(selector.scores_).tolist() == [True] * len(y)


@fuzz(30, 1200, SEED)
def test_runs_go_on_from_every_boundary(seed):
    """Checkpoints and ends at every hook: the rows, epochs and random numbers are those of the uninterrupted run."""
    run = draw_run(random.Random(seed))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        whole, checkpoint = fit(folder, run.options), None
        for part, interruption in enumerate([*run.interruptions, None]):
            resume = {"ckpt_path": checkpoint, "weights_only": False, "seed": part + 2} if checkpoint else {}
            trained = fit(folder, run.options, run.save, interruption, run.early, **resume)
            checkpoint = last_checkpoint(folder)
    assert trained == whole


def same(got, expected):
    """Whether numbers in lists and dictionaries are those that are expected, up to the rounding of fp32."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, torch.Tensor):
        return got.dtype == expected.dtype and torch.equal(got, expected)
    return got == (expected if not isinstance(expected, float) else pytest.approx(expected, 1e-3, 1e-6, nan_ok=True))


@pytest.fixture(scope="module")
def two_ranks():
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


ROW = st.integers(0, MOST - 1)
CANDIDATES = lists(lists(st.tuples(ROW, st.integers(0, 2)), max_size=5), min_size=3, max_size=3)
RANK = st.tuples(lists(ROW, max_size=6), CANDIDATES, st.booleans())
KEEP, POOL = pick([0.1, 0.3, 0.5, 0.75, 1.0]), st.integers(1, 12)


@fuzz(
    40,
    1500,
    RANK,
    RANK,
    pick(DTYPES),
    pick([(), (3,), (0,), (2, 3)]),
    lists(NUMBERS, min_size=MOST, max_size=MOST),
    KEEP,
    POOL,
    st.integers(1, 3),
)
def test_rows_of_two_ranks(two_ranks, one, other, dtype, shape, scores, keep, pool, steps):
    """Unequal numbers of rows on two processes, none on some, are what one process makes of all of them."""
    pairs = [pair for pair in zip(one[1][:steps], other[1][:steps], strict=True) if any(pair)] or [([(0, 1)], [])]
    scores = [*map(float, torch.tensor(scores))]
    both = [
        Rows(dtype, shape, rows, [pair[rank] for pair in pairs], scores, pool, keep, fails)
        for rank, (rows, _, fails) in enumerate((one, other))
    ]
    assert same(two_ranks.ask(gather, *both), gathered(*both))


SAMPLES = lists(ROW, min_size=1, max_size=6)
ALIKE = st.builds(functools.partial, st.just(build), pick(["dict", "list", "tuple"]), FIELDS, FIELDS)
UNEQUAL = lists(st.one_of(st.tuples(SAMPLES, SAMPLES), st.just(([], []))), min_size=1, max_size=4).filter(
    lambda batches: any(samples for samples, _ in batches)
)
FITS = st.builds(
    Fit,
    ALIKE,
    UNEQUAL,
    lists(st.one_of(st.none(), st.integers(-32, 32)), min_size=1, max_size=MOST),
    pick(["uniform", "top", "selective_backprop", "importance"]),
    KEEP,
    POOL,
    st.integers(1, 2),
    st.integers(1, 3),
    SEED,
    st.integers(0, 4),
)


@fuzz(8, 1000, FITS)
def test_fits_of_two_ranks(two_ranks, fit):
    """Batches of unequal size, some of none, on two processes: rows, record, pool and ledger by plain loops."""
    answers, rows = trained(fit)
    with tempfile.TemporaryDirectory() as folder:
        got = two_ranks.ask(train, *[(fit, Path(folder))] * 2)
        ledger = Ledger(Path(folder) / "ledger")
        assert same([tuple(row.values()) for row in ledger.rows().to_pylist()], rows)
        assert ledger.cut_off() == {}
    assert same(got, answers)
