"""`curation select --target`: examples of files and of data sets, what is left out, and what is refused."""

import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curation.instances import TargetedSelector, contaminated, near_duplicates
from curation.instances.selection_index import SelectionIndex
from curation.recipes import cli
from curation.recipes.cli import select as command
from curation.recipes.image_classification import Images
from curation.recipes.text_classification import TextEmbeddings

pytest.importorskip("sklearn", reason="needs scikit-learn, from the [demo] extra")

QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DIGITS = ["--config", "fashion_mnist_long_tail", "--data.data=digits", "--data.imbalance=10", *QUIET]


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_target_keeps_its_own_kind(capsys):
    rng = np.random.default_rng(0)
    digits = Images("digits", imbalance=10.0)
    digits.setup("fit")
    x = torch.stack([x for x, _ in digits.val]).flatten(1).numpy()
    y = np.array([int(y) for _, y in digits.val])
    np.save("ones.npy", x[y == 1] + rng.normal(0, 1e-3, x[y == 1].shape).astype(np.float32))
    cli.main(["select", *DIGITS, "--target", "ones.npy", "--output", "ones.parquet", "--picture", "ones.png"])
    printed = capsys.readouterr().out
    index = SelectionIndex.load("ones.parquet")
    assert len(index) == round(0.1 * index.size)
    labels = np.array([int(digits.train[i][1]) for i in index.indices])
    assert (labels == 1).mean() > 0.5  # a tenth of all are
    assert "kept per class" in printed
    assert matplotlib.image.imread("ones.png").std() > 0.05
    with pytest.raises(SystemExit, match=r"must name a new file, but .ones.parquet. exists"):
        cli.main(["select", *DIGITS, "--target", "ones.npy", "--budget=0.2", "--output", "ones.parquet"])


def test_a_target_of_texts_is_embedded_by_the_recipe(capsys):
    rows = [{"question": "class Enum: members of an enumeration have names and values"}] * 3
    Path("target.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--config", "text_selection", "--data.data=library", "--data.embedder=words", *QUIET]
    cli.main(["select", *options, "--target", "target.jsonl", "--budget=0.05", "--output", "enum.parquet"])
    assert len(SelectionIndex.load("enum.parquet")) > 10
    Path("target.jsonl").write_text('{"answer": "4"}')
    with pytest.raises(SystemExit, match=r"column text, question or prompt, but .target.jsonl. has answer"):
        cli.main(["select", *options, "--target", "target.jsonl", "--output", "other.parquet"])


def test_targets_with_weights_of_a_data_set_and_a_file(tmp_path):
    """A folder is a data set as one of the hub is."""
    rows = [{"text": f"class Enum: members of an enumeration have names and values, number {i}"} for i in range(8)]
    (tmp_path / "org/enums").mkdir(parents=True)
    Path("org/enums/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: enums.jsonl\n---\n"
    )
    Path("org/enums/enums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("other.jsonl").write_text("\n".join(json.dumps({"text": f"a socket, {i}"}) for i in range(8)))
    config = ["--config", "text_selection", "--data.data=library", "--data.embedder=words", *QUIET]
    names = ["--target=org/enums:main:test[:6]", "--target=other.jsonl"]
    cli.main(["select", *config, *names, "--weights=3,1", "--budget=0.05", "--output", "both.parquet"])
    index = SelectionIndex.load("both.parquet")
    data = TextEmbeddings(data="library", embedder="words", samples_per_class=80, max_length=32, holdout=0.2)
    enums = data.features_of([row["text"] for row in rows[:6]])
    sockets = data.features_of([f"a socket, {i}" for i in range(8)])
    data.setup("fit")
    pool = torch.stack([x for x, *_ in data.train])
    targets = {"enums": enums, "sockets": sockets}
    expected = TargetedSelector(0.05, targets=targets, weights=[3, 1]).fit(pool)
    assert expected.report_["examples"] == 6 + 2
    assert index.indices.tolist() == expected.sample_indices_.tolist()
    assert json.loads(index.config)["weights"] == [3, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/nowhere:train", "`--target` must name texts, but 'org/nowhere:train' cannot be read: "),
        ("texts:validation", 'Unknown split "validation"'),
        ("texts:other:train", "BuilderConfig 'other' not found"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_named_before_the_pool_is_read(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "features_and_labels", None)
    (tmp_path / "texts").mkdir()
    Path("texts/train.jsonl").write_text('{"text": "a"}')
    config = ["--config", "text_selection", "--data.data=library", "--data.embedder=words", *QUIET]
    with pytest.raises(SystemExit, match=message):
        cli.main(["select", *config, f"--target={name}", "--output", "other.parquet"])


def test_what_is_shared_with_a_test_and_what_is_there_twice_does_not_stay(capsys):
    options = ["--config", "text_selection", "--data.data=library", "--data.embedder=words", *QUIET]
    data = TextEmbeddings(data="library", embedder="words", samples_per_class=80, holdout=0.2, seed=0)
    data.setup("fit")
    texts = data.train_texts
    torch.testing.assert_close(torch.stack([x for x, *_ in data.train]), data.features_of(texts))
    test = next(text for text in texts if len(text.split()) > 20)
    Path("test.jsonl").write_text(json.dumps({"text": "as asked: " + test}))
    Path("target.jsonl").write_text(json.dumps({"text": test}))
    near, shared = near_duplicates(features_of(options)), contaminated(texts, [test])
    common = ["select", *options, "--target", "target.jsonl", "--budget=0.5", "--output"]
    cli.main([*common, "all.parquet"])
    assert f"{near.sum()} of {len(texts):,} samples are near-duplicates (cosine >= 0.95), not left out" in (
        capsys.readouterr().out
    )
    assert len(SelectionIndex.load("all.parquet")) == round(0.5 * len(texts))
    cli.main([*common, "clean.parquet", "--decontaminate", "test.jsonl", "--duplicates=0.95"])
    printed = capsys.readouterr().out
    assert (
        f"{shared.sum()} of {len(texts):,} samples left out: they share 13 words in a row with a test; 0 of 1 "
        in printed
    )
    assert f"{near.sum()} of {len(texts):,} samples are near-duplicates (cosine >= 0.95), left out" in printed
    kept = SelectionIndex.load("clean.parquet").indices
    assert shared.sum() > 0 < near.sum()
    assert len(kept) == round(0.5 * (~(shared | near)).sum())
    assert not (shared | near)[kept].any()


def test_features_in_files_that_are_not_read_into_memory(capsys):
    x = np.random.default_rng(0).standard_normal((len(digits_of_recipe()), 5)).astype(np.float32)
    np.save("ones.npy", x[:4])
    np.save("all.npy", x)
    Path("shards").mkdir()
    half = len(x) // 2
    for name, part in (("a", x[:half]), ("b", x[half:])):
        pq.write_table(pa.table({"features": list(part)}), f"shards/{name}.parquet")
    common = ["select", *DIGITS, "--target", "ones.npy"]
    cli.main([*common, "--features=all.npy", "--output", "one.parquet"])
    assert "near-duplicates (cosine" in capsys.readouterr().out
    cli.main([*common, "--features=shards", "--output", "two.parquet", "--picture", "two.png"])
    printed = capsys.readouterr().out
    assert "near-duplicates are not looked for" in printed
    assert re.search(rf"{len(x):,} rows for 4 examples: about \d+ s, 0\.\d GiB beside the pool", printed)
    one, two = (SelectionIndex.load(f"{name}.parquet") for name in ("one", "two"))
    assert one.indices.tolist() == two.indices.tolist()
    Path("shards/b.parquet").unlink()
    with pytest.raises(SystemExit, match=rf"`--features` must hold \[{len(x)}, D\].* has \[{half}, 5\]"):
        cli.main([*common, "--features=shards", "--output", "three.parquet"])
    with pytest.raises(SystemExit, match="`--duplicates` must be left out where `--features` is a folder"):
        cli.main([*common, "--features=shards", "--duplicates=0.9", "--output", "three.parquet"])
    with pytest.raises(SystemExit, match=r"must name a new file, but 'two\.parquet' exists"):  # of other shards
        cli.main([*common, "--features=shards", "--output", "two.parquet"])


def features_of(options):
    trainer, module, data = command.make_recipe(options)
    return command.features_and_labels(
        trainer, module, command.in_order(data.train_dataloader()), None, "training", False
    )[0]


def test_losses_before_and_after_training_on_a_target(capsys):
    before, after = np.random.default_rng(0).random((2, len(digits_of_recipe()))).astype(np.float32)
    np.save("before.npy", before)
    torch.save(torch.from_numpy(after), "after.pt")  # as `curation irreducible` writes it
    cli.main(["select", *DIGITS, "--losses", "before.npy", "after.pt", "--output", "kept.parquet"])
    index = SelectionIndex.load("kept.parquet")
    expected = np.argsort(after - before, kind="stable")[: round(0.1 * len(before))]
    assert index.indices.tolist() == sorted(expected)
    assert "kept per class" in capsys.readouterr().out
    np.save("short.npy", before[1:])
    with pytest.raises(SystemExit, match=rf"`--losses` must hold \[{len(before)}\].*'short.npy' has"):
        cli.main(["select", *DIGITS, "--losses", "short.npy", "after.pt", "--output", "other.parquet"])
    Path("broken.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"`--losses` must name files of losses, but got .broken\.pt."):
        cli.main(["select", *DIGITS, "--losses", "before.npy", "broken.pt", "--output", "other.parquet"])


def digits_of_recipe():
    digits = Images("digits", imbalance=10.0)
    digits.setup("fit")
    return digits.train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "nowhere.jsonl"], "`--target` must name a file, or a data set .* there is no 'nowhere.jsonl'"),
        (["--target", "org/name"], "`--target` must name a file, or a data set .* there is no 'org/name'"),
        (["--target", "ones.npy", "--weights=3,1"], "`--weights` must be a number > 0 for each of 1 .* got '3,1'"),
        (["--target", "ones.npy", "--weights=0"], "`--weights` must be a number > 0 .* got '0'"),
        (["--target", "ones.npy", "--weights=a"], "`--weights` must be a number > 0 .* got 'a'"),
        (["--weights=1"], "`--weights` must be a number > 0 for each of 0 `--target`"),
        (["--target", "given.jsonl"], "`--target` must be a .npy file .* Images has no method `features_of"),
        (["--target", "given.jsonl", "--selector", "mine.Mine"], "`--target` must be left out with `--selector`"),
        (["--target", "given.jsonl", "--repeats=3"], "`--target` must be left out with `--probe` and `--repeats`"),
        (
            ["--losses", "given.jsonl", "given.jsonl", "--probe=mine.Mine"],
            "`--losses` must be left out with `--probe`",
        ),
        (["--losses", "given.jsonl", "nowhere.npy"], "`--losses` must name a file, but there is no 'nowhere.npy'"),
        (["--losses", *["given.jsonl"] * 2, "--picture=a.png"], "`--picture` must be left out with `--losses`"),
        (["--losses", *["given.jsonl"] * 2, "--target=given.jsonl"], "`--target` must be left out with `--losses`"),
        (["--target", "given.jsonl", "--decontaminate=no.jsonl"], "`--decontaminate` must name a file"),
        (["--target", "given.jsonl", "--duplicates=2"], r"`--duplicates` must be in \(0, 1\]"),
        (["--target", "given.jsonl", "--ngram=0"], "`--ngram` must be"),
        (["--decontaminate=given.jsonl"], "`--decontaminate` needs `--target` or `--losses`"),
        (["--duplicates=0.9"], "`--duplicates` needs `--target` or `--losses`"),
        (["--target", "ones.npy", "--decontaminate=given.jsonl"], "`--decontaminate` needs .* but Images has none"),
    ],
)
def test_targets_that_cannot_be_used_are_named(options, message):
    Path("given.jsonl").write_text('{"text": "a"}')
    np.save("ones.npy", np.ones((1, 64), np.float32))
    with pytest.raises(SystemExit, match=message):
        cli.main(["select", *DIGITS, *options, "--output", "other.parquet"])
