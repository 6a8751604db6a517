"""Utility-diversity selection inside a fit of a language model, against the definition."""

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCABULARY, LanguageModel, Watch, assert_same_weights, texts, trainer, weights
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import BartConfig, BartForConditionalGeneration
from twins import UtilityDiversityTwin

import curation.callbacks.online.utility_diversity as callback_module
from curation.batch import SampleIds
from curation.callbacks import ExactResume, UtilityDiversitySelection


class Scores(UtilityDiversitySelection):
    """Keeps what was computed, for the tests."""

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        self.all_scores, self.all_rows = [], []

    def score(self, *args):
        scores = super().score(*args)
        self.all_scores.append(scores.clone())
        return scores

    def on_kept(self, trainer, rows, k):
        self.all_rows.append(rows.tolist())
        super().on_kept(trainer, rows, k)


def fit(rule, module=None, samples=None, **kwargs):
    watch = Watch()
    module = module or LanguageModel()
    run = trainer(rule, watch, **{"max_epochs": 1, **kwargs})
    run.fit(module, DataLoader(samples or texts(), batch_size=8))
    return watch.batches


@pytest.mark.parametrize("normalization", ["length", "none", "paper"])
@pytest.mark.parametrize("head", ["auto", "none"])
def test_selection_in_a_fit_equals_the_definition(head, normalization):
    rule = Scores(keep=0.25, alpha=0.5, normalization=normalization, head=head, seed=11)
    fit(rule)
    reference, model = UtilityDiversityTwin(0.5, normalization, 11), LanguageModel().model.eval()
    for i, batch in enumerate(DataLoader(texts(), batch_size=8)):
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        expected = reference.score(i, 0, logits, batch["labels"][:, 1:])
        torch.testing.assert_close(rule.all_scores[i].double(), expected, rtol=2e-3, atol=2e-3)
        rows = sorted(expected.argsort(descending=True)[:2].tolist())
        assert rule.all_rows[i] == rows
        reference.keep(rows), reference.end_step()
    assert ("without forming logits" in rule.describe()) == (head == "auto")


def test_padding_to_twice_the_length_changes_neither_scores_nor_selection():
    unpadded, padded = Scores(keep=0.25), Scores(keep=0.25)
    fit(unpadded)
    fit(padded, samples=texts(pad_to=40))
    assert unpadded.all_rows == padded.all_rows
    for a, b in zip(unpadded.all_scores, padded.all_scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_logits_that_are_capped_after_the_head_are_taken_from_the_forward():
    rule = Scores(keep=0.25)
    fit(rule, LanguageModel(soft_cap=1.0))
    assert "from logits" in rule.describe()
    plain = Scores(keep=0.25, head="none")
    fit(plain, LanguageModel(soft_cap=1.0))
    assert rule.all_rows == plain.all_rows


def test_padding_of_dropped_rows_is_trimmed_unless_asked_otherwise():
    trimmed = fit(UtilityDiversitySelection(keep=0.25))
    for batch in trimmed:
        assert batch["attention_mask"][:, -1].any()
    assert any(b["input_ids"].size(1) < 20 for b in trimmed)
    assert {b["input_ids"].size(1) for b in fit(UtilityDiversitySelection(keep=0.25, trim=False))} == {20}


class BiasedTagger(LightningModule):
    """A module of its own with a biased head, known by ``score_step`` and a path."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, 12)
            self.out = nn.Linear(12, 90)
            nn.init.normal_(self.out.bias)

    def score_step(self, batch):
        return self.out(self.embed(batch["ids"]))[:, 1:], batch["tags"][:, 1:]

    def training_step(self, batch, batch_idx):
        logits, tags = self.score_step(batch)
        return F.cross_entropy(logits.flatten(0, 1), tags.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_biased_head_by_its_path_scores_as_its_logits_do():
    g = torch.Generator().manual_seed(0)
    samples = [
        {"ids": torch.randint(0, VOCABULARY, (10,), generator=g), "tags": torch.randint(0, 90, (10,), generator=g)}
        for _ in range(32)
    ]
    by_head, by_logits = Scores(keep=0.25, head="out"), Scores(keep=0.25, head="none")
    fit(by_head, BiasedTagger(), samples)
    fit(by_logits, BiasedTagger(), samples)
    assert "score_step, without forming logits" in by_head.describe()
    assert by_head.all_rows == by_logits.all_rows
    for a, b in zip(by_head.all_scores, by_logits.all_scores, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-3, atol=1e-3)


def test_the_products_with_a_trained_head_are_refreshed_on_schedule(monkeypatch):
    monkeypatch.setattr(callback_module, "REFRESH_EVERY", 2)
    grams = []

    class Spy(UtilityDiversitySelection):
        def score(self, trainer, pl_module, *args):
            scores = super().score(trainer, pl_module, *args)
            weight = pl_module.model.lm_head.weight.detach().double()
            grams.append((self.scorer.head_gram - weight.T @ weight).abs().max().item() < 1e-5)
            return scores

    fit(Spy(keep=0.25), LanguageModel(lr=0.5))
    assert grams == [True, False, True, False, True, False]
    frozen, module = Spy(keep=0.25), LanguageModel()
    module.model.lm_head.weight.requires_grad_(False)
    fit(frozen, module)
    assert frozen._refreshed == 0
    assert frozen.state_dict()["scorer"]["head_gram"] is None


def test_a_trained_head_resumes_bit_for_bit(tmp_path):
    def run(steps, resume=None):
        module, watch = LanguageModel(lr=0.1), Watch()
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        fitter = trainer(
            UtilityDiversitySelection(keep=0.25), ExactResume(), watch, save,
            max_steps=steps, max_epochs=-1, enable_checkpointing=True,
        )  # fmt: skip
        fitter.fit(module, DataLoader(SampleIds(texts()), 8, shuffle=True), ckpt_path=resume)
        return weights(module), [b["input_ids"] for b in watch.batches]

    torch.manual_seed(0)
    whole, seen = run(10)
    torch.manual_seed(99)
    resumed, again = run(10, tmp_path / "step=4.ckpt")
    assert len(again) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[4:], again, strict=True))
    assert_same_weights(whole, resumed)


def test_a_broken_sample_is_neither_kept_nor_remembered():
    class Breaks(BiasedTagger):
        def score_step(self, batch):
            logits, tags = super().score_step(batch)
            return logits.index_fill(0, torch.tensor([3]), torch.nan), tags

    g = torch.Generator().manual_seed(0)
    samples = [
        {"ids": torch.randint(0, VOCABULARY, (10,), generator=g), "tags": torch.randint(0, 90, (10,), generator=g)}
        for _ in range(32)
    ]
    rule = Scores(keep=0.5, head="none")
    fit(rule, Breaks(), samples)
    assert all(3 not in rows for rows in rule.all_rows)
    assert rule.scorer.memory.pushed == 16
    assert rule.scorer.memory.rows.isfinite().all()


class Encoder(LightningModule):
    """BART adds a bias of the vocabulary's size to what its head gives."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = BartForConditionalGeneration(
                BartConfig(
                    vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
                )
            )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_model_that_needs_the_size_of_its_logits_is_scored_from_them():
    rule = Scores(keep=0.25)
    fit(rule, Encoder())
    assert "from logits (the head cannot be left out: The size of tensor" in rule.describe()
    plain = Scores(keep=0.25, head="none")
    fit(plain, Encoder())
    assert rule.all_rows == plain.all_rows
    with pytest.raises(ValueError, match=r"`head` must name the layer .* with 'model.lm_head' the module fails"):
        fit(UtilityDiversitySelection(keep=0.25, head="model.lm_head"), Encoder())


def test_a_first_batch_that_tells_nothing_leaves_the_route_open():
    samples = texts()
    for sample in samples[:8]:
        sample["labels"] = torch.full_like(sample["labels"], -100)
    rule = Scores(keep=0.25)
    fit(rule, samples=samples)
    assert "without forming logits" in rule.describe()
    assert len(rule.all_rows) == 6


def test_a_resumed_run_may_change_the_head_but_not_the_projections(tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    run = trainer(Scores(keep=0.25), save, enable_checkpointing=True, max_epochs=1)
    run.fit(LanguageModel(lr=0.1), DataLoader(texts(), 8))
    file = tmp_path / "step=6.ckpt"
    rule = Scores(keep=0.25, head="none")
    trainer(rule, max_epochs=2).fit(LanguageModel(lr=0.1), DataLoader(texts(), 8), ckpt_path=file)
    assert "from logits" in rule.describe()
    assert rule.batches == 12
    with pytest.raises(ValueError, match=r"Argument `seed` must be 0, .* but got 1"):
        trainer(Scores(keep=0.25, seed=1)).fit(LanguageModel(lr=0.1), DataLoader(texts(), 8), ckpt_path=file)


def test_rows_of_one_token_have_nothing_to_score_and_are_trained_on():
    rule = Scores(keep=0.25)
    batch = {"input_ids": torch.ones(32, 1, dtype=torch.long), "attention_mask": torch.ones(32, 1, dtype=torch.long)}

    class Sums(LanguageModel):
        def training_step(self, batch, batch_idx):
            return self.model(**batch).logits.sum()

    fit(rule, Sums(), [{k: v[i] for k, v in batch.items()} for i in range(32)])
    assert all(scores.tolist() == [0] * 8 for scores in rule.all_scores)


def test_a_default_of_double_precision_changes_nothing():
    rule, double = Scores(keep=0.25), Scores(keep=0.25)
    samples = [{"ids": torch.randint(0, VOCABULARY, (10,)), "tags": torch.randint(0, 90, (10,))} for _ in range(32)]
    module = BiasedTagger()
    fit(rule, module, samples)
    torch.set_default_dtype(torch.float64)
    try:
        fit(double, module, samples)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rule.all_rows == double.all_rows


def test_bad_arguments_are_named_before_training():
    with pytest.raises(ValueError, match=r"Argument `alpha` must be in \[0, 1e6\], but got inf"):
        UtilityDiversitySelection(keep=0.5, alpha=float("inf"))
    with pytest.raises(ValueError, match=r"Argument `normalization` must be .* but got 'sum'"):
        UtilityDiversitySelection(keep=0.5, normalization="sum")
    with pytest.raises(ValueError, match=r"Argument `precision` must be 'fit' or 'bf16', but got 'fp8'"):
        UtilityDiversitySelection(keep=0.5, precision="fp8")
    with pytest.raises(ValueError, match=r"Argument `head` must be a string, but got 3"):
        UtilityDiversitySelection(keep=0.5, head=3)

    class Untouched(LanguageModel):
        def training_step(self, *_):
            raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"Argument `head` must be .* but got 'model.head'"):
        fit(UtilityDiversitySelection(keep=0.5, head="model.head"), Untouched())


def test_a_module_that_gives_no_outputs_is_told_what_to_add():
    with pytest.raises(TypeError, match=r"(?s)Add this method.*def score_step"):
        fit(UtilityDiversitySelection(keep=0.5), samples=[{"text": torch.zeros(3)}] * 16)
