"""Utility-diversity selection inside a fit of a language model, against the definition."""

import curation.callbacks.utility_diversity as callback_module
import pytest
import torch
import torch.nn.functional as F
from curation.callbacks import ExactResume, UtilityDiversitySelection
from helpers import Watch, assert_same_weights, trainer, weights
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from curation.batch import SampleIds
from curation.online.sketch import cosine_projection

VOCABULARY = 200


class LanguageModel(LightningModule):
    def __init__(self, soft_cap: float | None = None, lr: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
            )  # fmt: skip
            self.model = LlamaForCausalLM(config)
        if soft_cap:
            plain = self.model.forward

            def forward(*args, **kwargs):
                output = plain(*args, **kwargs)
                output.logits = soft_cap * (output.logits / soft_cap).tanh()
                return output

            self.model.forward = forward

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def texts(n=48, pad_to=None):
    g = torch.Generator().manual_seed(3)
    samples = []
    for _ in range(n):
        length = int(torch.randint(4, 20, (), generator=g))
        ids = torch.randint(3, VOCABULARY, (length,), generator=g)
        width = pad_to or 20
        labels = F.pad(ids, (0, width - length), value=-100)
        labels[:2] = -100
        mask = F.pad(torch.ones_like(ids), (0, width - length))
        samples.append({"input_ids": F.pad(ids, (0, width - length)), "attention_mask": mask, "labels": labels})
    return samples


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


def slow_scores(batches, alpha, normalization, keep, sketches_of):
    """The rule by its definition: logits, SVD, a list as memory."""
    model = LanguageModel().model.eval()
    memory, all_scores, all_rows = [], [], []
    for batch in batches:
        with torch.no_grad():
            logits = (
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
            )
        scored = batch["labels"][:, 1:] != -100
        if normalization == "paper":
            scored = torch.ones_like(scored)
        counts = scored.sum(1)
        u = torch.stack([torch.linalg.svdvals(x[m]).sum() for x, m in zip(logits, scored, strict=True)])
        z = torch.stack([sketches_of(x[m]) for x, m in zip(logits, scored, strict=True)])
        if normalization == "length":
            u, z = u / counts, z / counts.sqrt()[:, None]
        d = torch.stack([(z - q).norm(dim=1) for q in memory]).mean(0) if memory else torch.zeros(8).double()
        if normalization != "paper":
            u, d = ((t - t.mean()) / t.std(correction=0) if t.std() > 1e-9 else t * 0 for t in (u, d))
        all_scores.append(u + alpha * d)
        rows = sorted(all_scores[-1].argsort(descending=True)[: int(keep * 8)].tolist())
        all_rows.append(rows)
        memory += list(z[rows])
    return all_scores, all_rows


@pytest.mark.parametrize("normalization", ["length", "none", "paper"])
@pytest.mark.parametrize("head", ["auto", "none"])
def test_selection_in_a_fit_equals_the_definition(head, normalization):
    rule = Scores(keep=0.25, alpha=0.5, normalization=normalization, head=head, seed=11)
    fit(rule)

    def sketches_of(logits):
        n = len(logits)
        if normalization == "paper":
            tokens, vocab = cosine_projection(8, n, 13), cosine_projection(128, VOCABULARY, 11)
        else:
            tokens, vocab = rule._token_projection[:, :n], callback_module.sign_projection(128, VOCABULARY, 11)
        return (tokens.double() @ logits @ vocab.double().T).flatten()

    batches = list(DataLoader(texts(), batch_size=8))
    scores, rows = slow_scores(batches, 0.5, normalization, 0.25, sketches_of)
    assert rule.all_rows == rows
    for got, expected in zip(rule.all_scores, scores, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)
    assert ("without forming logits" in rule.describe()) == (head == "auto")


def test_padding_to_twice_the_length_changes_neither_scores_nor_selection():
    one, two = Scores(keep=0.25), Scores(keep=0.25)
    fit(one)
    fit(two, samples=texts(pad_to=40))
    assert one.all_rows == two.all_rows
    for a, b in zip(one.all_scores, two.all_scores, strict=True):
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
        def on_kept(self, trainer, rows, k):
            super().on_kept(trainer, rows, k)
            weight = trainer.lightning_module.model.lm_head.weight.detach().double()
            grams.append((self._gram - weight.T @ weight).abs().max().item() < 1e-5)

    fit(Spy(keep=0.25), LanguageModel(lr=0.5))
    assert grams == [True, False, True, False, True, False]
    frozen, module = Spy(keep=0.25), LanguageModel()
    module.model.lm_head.weight.requires_grad_(False)
    fit(frozen, module)
    assert frozen._refreshed == 0
    assert "head" not in frozen.state_dict()


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
    assert rule._memory.pushed == 16
    assert rule._memory.rows.isfinite().all()


def test_bad_arguments_are_named_before_training():
    with pytest.raises(ValueError, match=r"Argument `alpha` must be a finite number >= 0, but got inf"):
        UtilityDiversitySelection(keep=0.5, alpha=float("inf"))
    with pytest.raises(ValueError, match=r"Argument `normalization` must be .* but got 'sum'"):
        UtilityDiversitySelection(keep=0.5, normalization="sum")

    class Untouched(LanguageModel):
        def training_step(self, *_):
            raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"Argument `head` must be .* but got 'model.head'"):
        fit(UtilityDiversitySelection(keep=0.5, head="model.head"), Untouched())


def test_a_module_that_gives_no_outputs_is_told_what_to_add():
    with pytest.raises(TypeError, match="Add a method `score_step"):
        fit(UtilityDiversitySelection(keep=0.5), samples=[{"text": torch.zeros(3)}] * 16)
