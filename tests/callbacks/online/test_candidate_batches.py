"""Candidates from several batches of the data loader, of which as many rows are trained on as one has."""

import pytest
import torch
from helpers import Classifier, LanguageModel, Proxy, Watch, assert_same_weights, data, texts, trainer, weights
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import TwoRanks
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, default_collate
from twins import tags

from curation.batch import SampleIds
from curation.callbacks import (
    ConceptAwareSelection,
    ExactResume,
    HardSampleSelection,
    OnlineSelection,
    ProxySelection,
    SelectionLedger,
    UniformSelection,
    UtilityDiversitySelection,
)
from curation.records import Ledger
from curation.samplers import ConceptIndex

MADE = {
    "uniform": lambda **how: UniformSelection(**how),
    "top": lambda **how: HardSampleSelection(**how),
    "selective_backprop": lambda **how: HardSampleSelection(rule="selective_backprop", **how),
    "importance": lambda **how: HardSampleSelection(rule="importance", score="grad_norm", **how),
    "utility_diversity": lambda **how: UtilityDiversitySelection(**how),
    "concept_aware": lambda **how: ConceptAwareSelection(
        concepts=ConceptIndex.from_lists(map(tags, range(72))), **how
    ),
    "proxy": lambda **how: ProxySelection(**{"keep": None, **how}, proxy=Proxy(), start=0.2),
}


def narrow(samples):
    """Texts padded to the longest of a batch, not of the data set."""
    batch = default_collate(samples)
    width = int(batch["attention_mask"].sum(1).max())
    return {k: v[:, :width] if v.dim() > 1 else v for k, v in batch.items()}


def fit(selection, batch_size, text, *callbacks, resume=None, workers=0, **options):
    """Sample ids, weights and parameters of a fit of two epochs of 72 samples."""
    seed_everything(7, verbose=False)
    module = LanguageModel(lr=0.01) if text else Classifier()
    samples = SampleIds(texts(72) if text else data(72))
    batches = DataLoader(samples, batch_size, True, collate_fn=narrow if text else None, num_workers=workers)
    run = trainer(selection, *callbacks, ExactResume(), **options)
    run.fit(module, batches, ckpt_path=resume)
    return weights(module), run


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("text", [False, True], ids=["rows", "text"])
def test_trains_on_what_one_large_batch_gives(name, text, tmp_path):
    small, run = fit(MADE[name](candidate_batches=8), 2, text, SelectionLedger(tmp_path / "small"))
    large, other = fit(MADE[name](keep=1 / 8), 16, text, SelectionLedger(tmp_path / "large"))
    rows, expected = (Ledger(tmp_path / part).rows().to_pylist() for part in ("small", "large"))
    for row, wanted in zip(rows, expected, strict=True):
        for column in ("score", "weight"):  # sums in another order
            assert row.pop(column) == pytest.approx(wanted.pop(column), abs=2e-5, nan_ok=True)
        assert row == wanted
    for parameter, value in large.items():
        torch.testing.assert_close(small[parameter], value, rtol=1e-4, atol=1e-6)
    assert run.num_training_batches == other.num_training_batches == 5
    assert run.callbacks[0].samples_trained == 2 * 5 * 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("text", [False, True], ids=["rows", "text"])
def test_resumes_bit_for_bit(text, workers, tmp_path):
    made = MADE["utility_diversity" if text else "selective_backprop"]
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, _ = fit(made(candidate_batches=8), 2, text, save, workers=workers, enable_checkpointing=True)
    for step in (3, 6):
        resume = tmp_path / f"step={step}.ckpt"
        resumed, _ = fit(made(candidate_batches=8), 2, text, resume=resume, workers=workers)
        assert_same_weights(whole, resumed)


def test_another_number_of_batches_is_no_exact_resume(tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    fit(UniformSelection(candidate_batches=8), 2, False, save, max_steps=3, enable_checkpointing=True)
    with pytest.raises(ValueError, match="`candidate_batches=8`, but now it is 4"):
        fit(UniformSelection(candidate_batches=4), 2, False, resume=tmp_path / "step=3.ckpt")


def test_accumulates(tmp_path):
    small, run = fit(UniformSelection(candidate_batches=4), 2, False, accumulate_grad_batches=3)
    large, _ = fit(UniformSelection(keep=1 / 4), 8, False, accumulate_grad_batches=3)
    assert_same_weights(small, large)
    assert run.global_step == 2 * 3


class ByNeighbour(OnlineSelection):
    """A rule of a user's own whose scores depend on the other rows."""

    def score(self, trainer, pl_module, batch, sample_ids):
        self.sizes = [*getattr(self, "sizes", []), len(batch[0])]
        return batch[0].sum(1).sub(batch[0].sum(1).mean()).abs()


def test_a_rule_of_ones_own_gets_all_candidates_unless_it_scores_by_row():
    rule = ByNeighbour(candidate_batches=4)
    fit(rule, 2, False, max_epochs=1)
    assert rule.sizes == [8] * 9
    rule = ByNeighbour(candidate_batches=4)
    rule.by_row = True
    fit(rule, 2, False, max_epochs=1)
    assert rule.sizes == [2] * 36


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"candidate_batches": 8, "keep": 0.25}, "Argument `keep` must be None, or 1/8 .* but got 0.25"),
        ({"candidate_batches": 0}, "Argument `candidate_batches` must be"),
        ({"candidate_batches": 8, "when": "pays"}, "Argument `when` must be 'always' with `candidate_batches`"),
        ({}, "Argument `keep` must be"),
    ],
)
def test_bad_arguments(how, message):
    with pytest.raises(ValueError, match=message):
        HardSampleSelection(**how)


class Wide(LightningModule):
    """Its activations are far larger than its batch and its weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 20_000), nn.ReLU(), nn.Linear(20_000, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def peak(*callbacks, batch_size):
    """Largest number of live bytes in the second step, over those before it."""
    seed_everything(7, verbose=False)
    module, most = Wide(), []
    batches = DataLoader(SampleIds(data(1024)), batch_size)

    class Step(Watch):
        def on_train_batch_start(self, *_):
            pass

        def on_train_batch_end(self, *_):
            if not most:
                self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profiler.__enter__()
                most.append(0)
            elif self.profiler is not None:
                self.profiler.__exit__(None, None, None)
                total = 0
                for event in self.profiler.profiler.kineto_results.events():
                    if event.name() == "[memory]":
                        total += event.nbytes()
                        most[0] = max(most[0], total)
                self.profiler = None

    trainer(Step(), *callbacks, max_epochs=1, max_steps=3).fit(module, batches)
    return most[0]


def test_scoring_holds_the_activations_of_one_batch():
    plain = peak(batch_size=64)
    assert peak(HardSampleSelection(candidate_batches=4), batch_size=64) <= 1.1 * plain
    assert peak(HardSampleSelection(keep=1 / 4), batch_size=256) > 1.5 * plain  # what it is for


@pytest.mark.parametrize("name", ["top", "utility_diversity"])
def test_parts_are_of_texts_of_like_length(name):
    """Their tokens are those of the candidates sorted by length and cut."""

    class Counting(LanguageModel):
        def __init__(self):
            super().__init__()
            self.scored, self.lengths = [], []
            self.model.model.register_forward_pre_hook(self.count, with_kwargs=True)

        def count(self, module, args, kwargs):
            if not torch.is_grad_enabled() and len(kwargs["input_ids"]) == 4:  # one row finds the route
                self.scored.append(kwargs["input_ids"].shape)
                self.lengths += kwargs["attention_mask"].sum(1).tolist()

    module = Counting()
    batches = DataLoader(SampleIds(texts(16)), 4, collate_fn=narrow)
    trainer(MADE[name](candidate_batches=4), max_epochs=1).fit(module, batches)
    lengths = sorted((int(sample["attention_mask"].sum()) for sample in texts(16)), reverse=True)
    assert [tuple(shape) for shape in module.scored[-4:]] == [(4, longest) for longest in lengths[::4]]
    assert module.lengths[-16:] == lengths


def rank(arguments):
    name, candidates, folder = arguments
    how = {"candidate_batches": 8} if candidates == 2 else {"keep": 1 / 8}
    small, _ = fit(MADE[name](**how), candidates, False, SelectionLedger(folder), devices=2, strategy="ddp")
    return small


@pytest.fixture(scope="module")
def ranks():
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("name", ["uniform", "selective_backprop", "utility_diversity"])
def test_two_ranks_train_on_what_one_large_batch_gives(ranks, name, tmp_path):
    results, ledgers = [], []
    for candidates in (2, 16):
        folder = str(tmp_path / str(candidates))
        results.append(ranks.ask(rank, *[(name, candidates, folder)] * 2))
        rows = Ledger(folder).rows()
        ledgers.append(sorted(zip(*(rows[c].to_pylist() for c in ("step", "sample_id", "kept")), strict=True)))
    assert ledgers[0] == ledgers[1]
    for small, large in zip(*results, strict=True):
        for parameter, value in large.items():
            torch.testing.assert_close(small[parameter], value, rtol=1e-5, atol=1e-6)
