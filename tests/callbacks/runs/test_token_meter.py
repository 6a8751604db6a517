"""Tokens that were read and computed, against a count by hand, and the picture."""

from tempfile import TemporaryDirectory

import pytest
import torch
from helpers import Classifier, LanguageModel, loader, texts, trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib.image import imread
from processes import TwoRanks
from torch.utils.data import DataLoader

from curation.batch import SampleIds
from curation.callbacks import TokenMeter, UniformSelection

SAMPLES = texts(24)


def of_texts(**options):
    return DataLoader(SAMPLES, 4, **options)


def counted(samples, width=20):
    """Rows of each length, and of each width."""
    counts = torch.zeros(2, 16385, dtype=torch.int64)
    for sample in samples:
        counts[0, int(sample["attention_mask"].sum())] += 1
        counts[1, width] += 1
    return counts


def test_padding_and_labels_are_those_of_a_count_by_hand(tmp_path):
    meter = TokenMeter()
    run = trainer(meter, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    run.fit(LanguageModel(), of_texts())
    assert meter.counts.equal(2 * counted(SAMPLES))
    last = SAMPLES[12:]  # since the last logging step
    computed = 20 * len(last)
    real = sum(int(s["attention_mask"].sum()) for s in last)
    labelled = sum(int((s["labels"] != -100).sum()) for s in last)
    logged = {name: float(value) for name, value in run.logged_metrics.items()}
    assert logged["curation/padding_fraction"] == pytest.approx(1 - real / computed)
    assert logged["curation/label_fraction"] == pytest.approx(labelled / computed)
    assert logged["curation/rank_tokens"] == logged["curation/rank_tokens_max"] == 80
    share = logged["curation/real_tokens_per_second"] / logged["curation/tokens_per_second"]
    assert share == pytest.approx(real / computed)
    picture = imread(tmp_path / "lightning_logs" / "version_0" / "tokens.png")
    assert picture.std() > 0.05


def test_what_a_selection_leaves_is_counted():
    meter = TokenMeter()
    trainer(meter, UniformSelection(keep=0.5), max_epochs=1).fit(LanguageModel(), DataLoader(SampleIds(SAMPLES), 4))
    assert meter.counts.sum(1).tolist() == [12, 12]


def test_micro_batches_are_counted_once(tmp_path):
    meter = TokenMeter()
    run = trainer(meter, max_epochs=1, accumulate_grad_batches=2, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(LanguageModel(), of_texts())
    assert meter.counts.equal(counted(SAMPLES))
    assert run.logged_metrics["curation/rank_tokens"] == 80


def test_a_resumed_fit_goes_on_counting(tmp_path):
    run = trainer(TokenMeter(), max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(LanguageModel(), of_texts())
    run.save_checkpoint(tmp_path / "half.ckpt")
    meter = TokenMeter()
    again = trainer(meter, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    again.fit(LanguageModel(), of_texts(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert meter.counts.equal(2 * counted(SAMPLES))


def test_other_batches_are_refused():
    with pytest.raises(TypeError, match="`input_ids` and `attention_mask`"):
        trainer(TokenMeter(), max_epochs=1).fit(Classifier(), loader())


def rank(folder):
    """Batches of 4 rows, as wide as 20 tokens on rank 0 and 16 on rank 1."""
    options = {"logger": CSVLogger(folder), "log_every_n_steps": 1, "use_distributed_sampler": False}
    meter = TokenMeter()
    run = trainer(meter, max_epochs=1, strategy="ddp", devices=2, **options)
    width = 20 - 4 * run.global_rank
    samples = [{name: value[:width] for name, value in sample.items()} for sample in SAMPLES[:8]]
    run.fit(LanguageModel(), DataLoader(samples, 4))
    return meter.counts.sum(1).tolist(), {name: float(value) for name, value in run.logged_metrics.items()}


def test_tokens_of_all_processes():
    ranks = TwoRanks()
    with TemporaryDirectory() as folder:
        (counts, logged), other = ranks.ask(rank, folder, folder)
    ranks.stop()
    assert counts == other[0] == [16, 16]
    assert (logged["curation/rank_tokens"], logged["curation/rank_tokens_max"]) == (72, 80)
