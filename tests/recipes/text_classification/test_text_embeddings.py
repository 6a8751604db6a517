"""Text classification on embeddings: what is embedded and kept, how it is split, and the packaged recipe."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import trainer

from curation.recipes import cli
from curation.recipes.sources import resolve
from curation.recipes.text_classification import LinearProbe, TextEmbeddings, text_embeddings
from curation.recipes.text_classification.labelled_texts import FAMILIES, load_texts
from curation.recipes.text_classification.text_embeddings import MINILM, embeddings

transformers = pytest.importorskip("transformers", reason="needs transformers, from the [recipes] extra")
tokenizers = pytest.importorskip("tokenizers", reason="needs transformers, from the [recipes] extra")

WORDS = ["red", "green", "blue", "one", "two", "three"]
COLOURS, NUMBERS = WORDS[:3], WORDS[3:]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A transformer of one word per token."""
    folder = tmp_path_factory.mktemp("embedder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def rows(n, seed=0):
    draw = np.random.default_rng(seed)
    kinds = [("colour", COLOURS), ("number", NUMBERS)]
    return [
        {"text": " ".join(draw.choice(kinds[i % 2][1], draw.integers(1, 9))), "label": kinds[i % 2][0]}
        for i in range(n)
    ]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write(content, name="rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(map(json.dumps, content)))
        return name

    return write


def embed_alone(text, embedder, max_length):
    """One text alone, so that nothing is padded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedder)
    ids = tokenizer(text)["input_ids"]
    if len(ids) > max_length:
        ids = [*ids[: max_length - 1], tokenizer.sep_token_id]
    with torch.no_grad():
        mean = (
            transformers.AutoModel.from_pretrained(embedder).eval()(torch.tensor([ids])).last_hidden_state[0].mean(0)
        )
    return mean / mean.norm()


def test_embeddings_are_those_of_each_text_alone_in_their_order(embedder, monkeypatch):
    monkeypatch.setattr(text_embeddings, "BATCH", 4)
    content = [row["text"] for row in rows(11)]
    vectors = embeddings(content, embedder, max_length=6)
    expected = torch.stack([embed_alone(text, embedder, 6) for text in content])
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-6)
    assert max(len(text.split()) for text in content) > 4  # some are cut off


def test_a_text_without_a_token_is_named(embedder, tmp_path):
    empty = embeddings(["", "red"], embedder, max_length=6)[0]  # of the first and the last token of BERT
    torch.testing.assert_close(empty, embed_alone("", embedder, 6), rtol=1e-5, atol=1e-6)
    plain = transformers.AutoTokenizer.from_pretrained(embedder).backend_tokenizer
    plain.post_processor = tokenizers.processors.Sequence([])
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]").save_pretrained(tmp_path)
    transformers.AutoModel.from_pretrained(embedder).save_pretrained(tmp_path)
    for texts in (["red", "", "blue"], ["red two", ""], ["", ""]):
        with pytest.raises(ValueError, match=r"`texts` must hold texts with a token, but text ., '', has none"):
            embeddings(texts, str(tmp_path), max_length=6)
    with pytest.raises(ValueError, match="`texts` must hold a text, but holds none"):
        embeddings([], embedder, max_length=6)


def test_a_damaged_cache_is_named(write, embedder):
    name = write(rows(20))
    kept = set_up(name, embedder, cache="cache.npy").train.dataset.tensors[0]
    assert torch.equal(set_up(name, embedder, cache="cache.npy").train.dataset.tensors[0], kept)
    with open("cache.npy", "rb") as file:
        whole = file.read()
    flipped = bytearray(whole)
    flipped[200] ^= 1
    for content in (flipped, whole[:500], whole[:-1], b"text", b""):
        with open("cache.npy", "wb") as file:
            file.write(content)
        with pytest.raises(ValueError, match=r"`cache` must name a new file, but 'cache.npy' is damaged"):
            set_up(name, embedder, cache="cache.npy")
    with open("cache.npy", "wb") as file:
        file.write(whole[: -(128 + 32)])  # as earlier versions wrote, without a checksum
    assert torch.equal(set_up(name, embedder, cache="cache.npy").train.dataset.tensors[0], kept)


def set_up(data, embedder, **kwargs):
    module = TextEmbeddings(data, embedder=embedder, **kwargs)
    module.setup("fit")
    return module


def test_labels_go_with_their_texts_through_the_split(write, embedder):
    content = rows(60)
    data = set_up(write(content), embedder, holdout=0.2)
    assert data.names == ["colour", "number"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [36, 12, 12]
    assert data.shape == (16,)
    known = embeddings([row["text"] for row in content], embedder, 64)
    places = []
    for part in (data.train.dataset, data.val, data.test):
        for x, y in part:
            distance = (known - x).abs().sum(1)
            same = (distance < 1e-4).nonzero().flatten().tolist()
            assert {content[i]["label"] for i in same} == {data.names[y]}
            places.append(same)
    texts_of = sorted(content[same[0]]["text"] for same in places)
    assert texts_of == sorted(row["text"] for row in content)  # each once
    again, reseeded = set_up("rows.jsonl", embedder, holdout=0.2), set_up("rows.jsonl", embedder, holdout=0.2, seed=1)
    assert torch.equal(again.train.dataset.tensors[0], data.train.dataset.tensors[0])
    assert not torch.equal(reseeded.train.dataset.tensors[0], data.train.dataset.tensors[0])
    x, y, ids = next(iter(data.train_dataloader()))
    assert torch.equal(data.train.dataset.tensors[0][ids["sample_id"]], x)
    assert len(x) == len(y) == 32


def test_the_splits_of_a_folder_are_used(write, embedder):
    for name, n in (("train", 20), ("test", 6)):
        write(rows(n, seed=n), f"folder/{name}.jsonl")
    data = set_up("folder", embedder)
    assert [len(part) for part in (data.train, data.val, data.test)] == [18, 2, 6]
    expected = embeddings([row["text"] for row in rows(6, seed=6)], embedder, 64)
    torch.testing.assert_close(data.test.tensors[0], expected)


def test_label_noise_is_the_share_asked_for_and_is_known(write, embedder):
    name = write(rows(1000))
    clean, noisy = (set_up(name, embedder, label_noise=noise, cache="cache.npy") for noise in (0.0, 0.4))
    (x, y), (also_x, wrong) = (d.train.dataset.tensors for d in (clean, noisy))
    assert torch.equal(x, also_x)
    assert torch.equal(y != wrong, noisy.corrupted)
    assert float(noisy.corrupted.float().mean()) == pytest.approx(0.4, abs=0.05)
    assert not clean.corrupted.any()
    assert torch.equal(clean.val.tensors[1], noisy.val.tensors[1])


def test_the_cache_holds_the_embeddings_of_these_texts_only(write, embedder, monkeypatch):
    content = rows(40)
    data = set_up(write(content), embedder, cache="new/cache.npy")
    kept = np.load("new/cache.npy")
    np.testing.assert_array_equal(kept, embeddings([row["text"] for row in content], embedder, 64))
    monkeypatch.setattr(text_embeddings, "embeddings", None)
    again = set_up("rows.jsonl", embedder, cache="new/cache.npy", seed=3)
    assert {row.tobytes() for row in again.val.tensors[0].numpy()} <= {row.tobytes() for row in kept}
    assert os.listdir("new") == ["cache.npy"]
    for changed in (content[1:], [content[1], content[0], *content[2:]]):
        with pytest.raises(ValueError, match=r"`cache` must name a new file, or .* but 'new/cache\.npy' has others"):
            set_up(write(changed, "changed.jsonl"), embedder, cache="new/cache.npy")
    with pytest.raises(ValueError, match="has others"):
        set_up("rows.jsonl", embedder, cache="new/cache.npy", max_length=5)
    np.save("plain.npy", kept)
    with pytest.raises(ValueError, match="has others"):
        set_up("rows.jsonl", embedder, cache="plain.npy")
    assert len(data.train) == 32


def test_what_cannot_be_read_is_named(write, embedder):
    for content, message in (
        ([{"text": "red"}], "must have the column label, but `train` of 'rows.jsonl' has not"),
        ([{"text": "red", "label": 1}, {"text": None, "label": 0}], "must hold texts, but row 1 of `train`"),
    ):
        with pytest.raises(ValueError, match=message):
            load_texts(write(content))
    write(rows(3), "folder/test.jsonl")
    with pytest.raises(ValueError, match="must have the split 'train', but 'folder' has not"):
        load_texts("folder")
    with pytest.raises(
        FileNotFoundError, match=r"Argument `data` must name a file with rows, but there is no 'no.jsonl'"
    ):
        load_texts("no.jsonl")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"samples_per_class": 0}, "`samples_per_class` must be an integer >= 1, but got 0"),
        ({"max_length": 0}, "`max_length` must be an integer >= 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1"),
        ({"seed": -1}, r"`seed` must be an integer in \[0, 2\^63\)"),
        ({"label_noise": 1.0}, r"`label_noise` must be in \[0, 1\), but got 1.0"),
        ({"holdout": 0.5}, r"`holdout` must be in \(0, 0.5\)"),
        ({"cache": "file"}, "`cache` must name a .npy file, but got 'file'"),
    ],
)
def test_arguments_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=f"Argument {message}"):
        TextEmbeddings(**bad)


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_probe_learns_and_comes_back_from_its_checkpoint(hidden, write, embedder, tmp_path):
    data = TextEmbeddings(write(rows(300)), embedder=embedder, cache="cache.npy")
    module = LinearProbe(classes=2, hidden=hidden)
    run = trainer(max_epochs=10)
    run.fit(module, datamodule=data)
    assert float(run.callback_metrics["val_accuracy"]) > 0.95
    run.save_checkpoint(tmp_path / "probe.ckpt")
    again = LinearProbe.load_from_checkpoint(tmp_path / "probe.ckpt")
    x = data.val.tensors[0]
    with torch.no_grad():
        assert torch.equal(again(x), module(x))
    assert sum(p.numel() for p in again.parameters()) == (16 * 2 + 2 if hidden is None else 16 * 8 + 8 + 8 * 2 + 2)


def test_questions_are_different_and_the_same_in_every_process():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, from the [demo] extra")
    code = (
        "import hashlib; from curation.recipes.text_classification.labelled_texts import load_texts; "
        "rows = load_texts('reasoning_gym', 5)['train']; "
        "print(hashlib.sha256(repr(rows.to_list()).encode()).hexdigest())"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"  # another than that of this process
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        check=True,
        text=True,
    )
    questions = load_texts("reasoning_gym", 5)["train"]
    assert run.stdout.split()[-1] == hashlib.sha256(repr(questions.to_list()).encode()).hexdigest()
    assert len(set(questions["text"])) == len(questions) == 5 * 40
    assert sorted(questions["label"]) == sorted(FAMILIES * 5)


def test_similar_texts_are_near_in_the_real_model():
    try:
        resolve(MINILM)
    except ImportError as error:
        pytest.skip(str(error))
    content = ["How many legs have three dogs?", "Count the legs of 5 cats.", "Solve 3x = 12 for x."]
    vectors = embeddings(content, MINILM, 64)
    assert vectors.shape == (3, 384)
    near = vectors @ vectors.T
    torch.testing.assert_close(near.diag(), torch.ones(3))
    assert near[0, 1] > 0.5 > 0.3 > near[0, 2]


def test_the_packaged_recipe_runs(write, embedder):
    run = cli.run(
        [
            "fit",
            "--config=text_selection",
            f"--data.data={write(rows(200))}",
            f"--data.embedder={embedder}",
            "--model.classes=2",
            "--trainer.callbacks.selector.budget=0.2",
            "--trainer.max_steps=20",
            "--trainer.val_check_interval=2",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
    )
    assert run.trainer.global_step == 20
    (selection,) = (c for c in run.trainer.callbacks if type(c).__name__ == "InstanceSelection")
    assert len(selection.indices) == 24
    assert float(run.trainer.callback_metrics["val_accuracy"]) > 0.9
    assert os.path.isfile("runs/text_selection.npy")
