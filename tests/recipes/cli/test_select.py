"""`curation select`: what is selected by, what is written, and what is said of it."""

import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from curation.evaluation.retention import Retention, retention
from curation.instances import (
    CoverageInstanceSelector,
    StratifiedRandomSelector,
    contaminated,
    coverage_shards,
    near_duplicates,
)
from curation.instances.selection_index import SelectionIndex, fingerprint
from curation.recipes import cli
from curation.recipes.catalogue import find_recipe
from curation.recipes.cli import select as command
from curation.recipes.compare.arms import configure, make_arm, resolve
from curation.recipes.image_classification import ImageClassifier, Images
from curation.recipes.instance_selection.retention_report import draw_retention, retention_report
from curation.recipes.text_classification import TextEmbeddings

pytest.importorskip("sklearn", reason="needs scikit-learn, from the [demo] extra")

QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DIGITS = ["--config", "fashion_mnist_long_tail", "--data.data=digits", "--data.imbalance=10", *QUIET]
SELECTOR = """
import numpy as np


class Longest:
    def __init__(self, budget=0.04, power=2.0, random_state=None):
        self.budget, self.power, self.random_state = budget, power, random_state

    def fit(self, X, y):
        with open("seeds.txt", "a") as file:
            print(self.random_state, file=file)
        np.savez("given.npz", X=X, y=y, seed=self.random_state)
        self.scores_ = (np.abs(X) ** self.power).sum(1).astype(np.float32)
        self.ranking_ = np.argsort(-self.scores_)[: round(self.budget * len(X))]
        self.sample_indices_ = np.sort(self.ranking_)
        return self


class Half:
    def fit(self, X, y):
        self.sample_indices_ = np.arange(0, len(X), 2)


class Draws(Longest):
    needs_classes = False

    def fit(self, X, y):
        draws = np.random.default_rng(self.random_state)
        self.sample_indices_ = draws.choice(len(X), round(self.budget * len(X)), replace=False)
"""


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "selectors_of_mine.py").write_text(SELECTOR)


def select(*args, selector="selectors_of_mine.Longest", config=DIGITS):
    cli.main(["select", *config, "--output=out/index.parquet", f"--selector={selector}", "--repeats=2", *args])


@pytest.fixture(scope="module")
def digits():
    data = Images(data="digits", imbalance=10, batch_size=64)
    data.setup("fit")
    return data


def parts(data):
    return [(x.flatten(1).numpy(), y.numpy()) for x, y in (data.train.dataset.tensors, data.val.tensors)]


def test_the_index_is_what_the_selector_chose_by_the_inputs(digits, capsys):
    select("--budget=0.1", "--options", '{"power": 3}', "--seed=5")
    given, index = np.load("given.npz"), SelectionIndex.load("out/index.parquet")
    train, test = parts(digits)
    np.testing.assert_array_equal(given["X"], train[0])
    np.testing.assert_array_equal(given["y"], train[1])
    assert given["seed"] == 6  # the last of the two
    assert Path("seeds.txt").read_text().split() == ["5", "6"]
    length = (np.abs(train[0]) ** 3).sum(1)
    best = np.argsort(-length)[: round(0.1 * len(length))]
    np.testing.assert_array_equal(index.indices, np.sort(best))
    np.testing.assert_allclose(index.scores, length[index.indices], rtol=1e-5)
    np.testing.assert_array_equal(index.first(7), np.sort(best[:7]))
    assert index.size == len(length)
    assert index.fingerprint == fingerprint(digits.train)
    config = json.loads(index.config)
    assert config["selector"] == "selectors_of_mine.Longest"
    assert config["options"] == {"power": 3}
    assert config["budget"] == 0.1
    assert "--data.data=digits" in config["recipe"]

    retained = retention(train, test, index.indices, repeats=2, seed=5)
    printed = capsys.readouterr().out
    name = f"sklearn.ensemble.RandomForestClassifier, on {len(test[1])} validation samples"
    assert retention_report(train[1], index.indices, retained, name) in printed
    assert f"{len(index):,} of {len(length):,} samples kept, reduction 90.1%" in printed


def test_a_layer_of_a_checkpoint_gives_the_features(digits):
    module = ImageClassifier()
    module.net(torch.zeros(1, *digits.shape))
    torch.save({"state_dict": module.state_dict()}, "m.ckpt")
    select("--layer=net.8", "--ckpt_path=m.ckpt", "--picture=p.png")
    given = np.load("given.npz")
    x, y = digits.train.dataset.tensors
    with torch.no_grad():
        expected = module.net[:9](x)
    np.testing.assert_allclose(given["X"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(given["y"], y)
    assert matplotlib.image.imread("p.png").std() > 0.05


def test_given_features_are_selected_by_and_the_probe_sees_the_recipes(digits, capsys):
    train, test = parts(digits)
    features = np.random.default_rng(0).random((len(train[1]), 3), np.float32)
    np.save("f.npy", features)
    select("--features=f.npy")
    np.testing.assert_array_equal(np.load("given.npz")["X"], features)
    indices = SelectionIndex.load("out/index.parquet").indices
    assert f"{retention(train, test, indices, repeats=2).full:.4f}" in capsys.readouterr().out
    np.save("few.npy", features[1:])
    with pytest.raises(
        SystemExit, match=rf"`--features` must hold \[{len(features)}, D\], .* 'few.npy' has \[\d+, 3\]"
    ):
        cli.main(["select", *DIGITS, "--output=o.parquet", "--selector=selectors_of_mine.Half", "--features=few.npy"])


def test_a_selector_needs_no_more_than_indices_and_the_probe_may_be_another(digits, capsys):
    select("--probe=sklearn.neighbors.KNeighborsClassifier", selector="selectors_of_mine.Half")
    index = SelectionIndex.load("out/index.parquet")
    np.testing.assert_array_equal(index.indices, np.arange(0, index.size, 2))
    np.testing.assert_array_equal(index.first(3), [0, 2, 4])
    assert np.isnan(index.scores).all()
    assert "KNeighborsClassifier, on 143 validation samples" in capsys.readouterr().out


def drawn(seeds, n, budget):
    return [np.random.default_rng(s).choice(n, round(budget * n), replace=False) for s in seeds]


def test_a_selection_is_drawn_anew_for_every_seed_and_the_first_is_saved(digits, capsys):
    select("--seed=3", "--budget=0.1", "--repeats=3", selector="selectors_of_mine.Draws")
    train, test = parts(digits)
    selections = drawn((3, 4, 5), len(train[1]), 0.1)
    index = SelectionIndex.load("out/index.parquet")
    np.testing.assert_array_equal(index.indices, np.sort(selections[0]))
    retained = retention(train, test, [np.unique(s) for s in selections], repeats=3, seed=3)
    printed = capsys.readouterr().out
    name = f"sklearn.ensemble.RandomForestClassifier, on {len(test[1])} validation samples"
    assert retention_report(train[1], index.indices, retained, name) in printed
    assert "95 % interval of 3 selections" in printed


def test_a_seed_that_is_given_is_one_selection(digits, capsys):
    select("--options", '{"random_state": 9}', "--budget=0.1", selector="selectors_of_mine.Draws")
    n = len(parts(digits)[0][1])
    np.testing.assert_array_equal(SelectionIndex.load("out/index.parquet").indices, np.sort(drawn([9], n, 0.1)[0]))
    assert "95 % prediction interval" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["indices", "mask", "index"])
def test_a_selection_made_elsewhere_is_measured_and_saved(way, digits, capsys):
    train, test = parts(digits)
    n, kept = len(train[1]), np.arange(5, 500, 5)
    file = "kept.parquet" if way == "index" else "kept.npy"
    if way == "index":
        SelectionIndex(kept, kept / n, np.arange(len(kept))[::-1], n).save(file)
    else:
        np.save(file, np.isin(np.arange(n), kept) if way == "mask" else kept[::-1])
    command_line = ["select", *DIGITS, "--output=out/index.parquet", f"--index={file}", "--repeats=2"]
    cli.main(command_line)
    index = SelectionIndex.load("out/index.parquet")
    np.testing.assert_array_equal(index.indices, kept)
    assert (index.size, index.fingerprint) == (n, fingerprint(digits.train))
    assert index.first(1).tolist() == ([5] if way == "mask" else [495])
    printed = capsys.readouterr().out
    name = f"sklearn.ensemble.RandomForestClassifier, on {len(test[1])} validation samples"
    assert retention_report(train[1], kept, retention(train, test, kept, repeats=2), name) in printed
    cli.main(command_line)
    assert "made before by this command" in capsys.readouterr().out
    np.save("few.npy", np.ones(7, bool))
    with pytest.raises(SystemExit, match=r"`--index` must be of the \d+ training samples, but got 'few.npy' of 7"):
        cli.main(["select", *DIGITS, "--output=o.parquet", "--index=few.npy"])


def test_numbers_are_scored_by_a_regressor_and_nothing_of_unlabelled_samples(tmp_path, capsys):
    (tmp_path / "data_of_mine.py").write_text(DATA)
    for data in ("Numbers", "Bare"):
        (tmp_path / f"{data}.yaml").write_text(RECIPE % data)
        cli.main(
            ["select", f"--config={data}.yaml", f"--output={data}.parquet", "--budget=0.3", "--repeats=2",
             "--selector=curation.instances.CoverageInstanceSelector", f"--picture={data}.png"]
        )  # fmt: skip
        assert len(SelectionIndex.load(f"{data}.parquet")) == 12
        assert matplotlib.image.imread(f"{data}.png").std() > 0.02
        printed = capsys.readouterr().out
        assert "12 of 40 samples kept, reduction 70.0%" in printed
        assert "kept per class" not in printed
        assert ("RandomForestRegressor, on 40 validation samples" in printed) == (data == "Numbers")
        assert ("no labels, so no probe says what is retained" in printed) == (data == "Bare")


def test_the_numbers_and_the_picture_go_to_wandb(monkeypatch):
    numbers, pictures = {}, []
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics, step=None: numbers.update(metrics))
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images: pictures.append((key, images)))
    logger = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.save_dir=."]
    select(*logger, "--options", '{"power": 1}', "--budget=0.25")
    assert numbers["instances/kept_fraction"] == pytest.approx(0.25, abs=2e-3)
    assert 0 < numbers["instances/retention"] < 1.2
    assert abs(numbers["instances/retention_vs_random"]) < 1
    ((key, (figure,)),) = pictures
    assert key == "instances/selection"
    assert len(figure.axes) == 2


def test_what_is_said_of_a_selection_is_the_difference_to_random():
    y = np.repeat([3, 7], 50)
    indices = np.array([0, 1, 99])
    random = (0.71, 0.72, 0.7, 0.71, 0.71)
    for selected, verdict in (
        ((0.81, 0.82, 0.81, 0.82, 0.81), "better than random"),
        ((0.61, 0.62, 0.61, 0.62, 0.61), "worse than random"),
        ((0.72, 0.73, 0.73, 0.72, 0.73), "no different from random"),
    ):
        lines = retention_report(y, indices, Retention(0.9, selected, random, 0.97), "Probe").splitlines()
        assert lines[0] == "3 of 100 samples kept, reduction 97.0%"
        assert lines[1] == "kept per class: 3: 2 of 50, 7: 1 of 50"
        assert lines[-1].endswith(f": {verdict}")
    mean, spread = np.mean(selected), np.std(selected, ddof=1)
    numbers = [f"{mean:.4f}", f"{mean / 0.9:.4f}", "±", f"{spread / 0.9:.4f}", f"{mean * 0.97:.4f}"]
    assert lines[5].split() == ["selected", *numbers]


@pytest.mark.parametrize(("n", "classes", "way"), [(40, 2, "PCA"), (300, 30, "t-SNE"), (6000, 10, "PCA")])
def test_few_samples_are_drawn_by_their_neighbours_and_many_by_components(n, classes, way):
    draws = np.random.default_rng(0)
    x, y = draws.random((n, 4), np.float32), draws.integers(classes, size=n)
    kept = StratifiedRandomSelector(random_state=0).fit(x, y).sample_indices_
    figure = draw_retention(x, y, kept, Retention(0.9, (0.8, 0.9), (0.7, 0.8), 0.96))
    scatter, bars = figure.axes
    assert scatter.get_title(loc="left").endswith(f"of {n:,} samples, {way}")
    assert (scatter.get_legend() is None) == (classes > 20)
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([0.85 / 0.9, 0.75 / 0.9])
    assert bars.get_ylim()[0] == 0
    assert bars.get_ylim()[1] > 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output=here"], "Argument `--output` must name a new file, but 'here' exists"),
        (["--picture=here"], "Argument `--picture` must name a new file, but 'here' exists"),
        (["--features=none.npy"], "Argument `--features` must name a file, but there is no 'none.npy'"),
        (["--ckpt_path=none", "--layer=net"], "Argument `--ckpt_path` must name a file, but there is no 'none'"),
        (["--ckpt_path=here"], "Argument `--layer` must be given with `--ckpt_path`, but got None"),
        (["--budget=1"], r"Argument `--budget` must be in \(0, 1\), but got 1.0"),
        (["--budget=nan"], r"Argument `--budget` must be in \(0, 1\), but got nan"),
        (["--index=none.npy"], "Argument `--index` must name a file, but there is no 'none.npy'"),
        (["--index=here"], "Argument `--index` must be left out with `--selector`, .* but got 'here'"),
        (["--repeats=1"], "Argument `--repeats` must be an integer >= 2, but got 1"),
        (["--seed=-1"], r"Argument `--seed` must be an integer in \[0, 2\^63\), but got -1"),
        (["--options=k"], "Argument `--options` must be a JSON object, but got 'k'"),
        (["--options=[1]"], r"Argument `--options` must be a JSON object, but got '\[1\]'"),
        (["--options={\"kay\": 1}"], "Argument `--selector` must be a class with its arguments, but .*'kay'"),
        (["--selector=selectors_of_mine.Half", "--budget=0.1"], "Argument `--selector` must be .*no arguments"),
        (["--selector=selectors_of_mine.None"], "Argument `--selector` must be .*no attribute 'None'"),
        (["--selector=Longest"], "Argument `--selector` must be a class with its arguments, but"),
        (["--probe=no.Such"], "Argument `--probe` must be a class with its arguments, but No module named 'no'"),
        (["--config=unknown"], "A recipe must be one of .* but got 'unknown'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_work(args, message, tmp_path, monkeypatch):
    (tmp_path / "here").touch()
    monkeypatch.setattr(Images, "setup", None)
    with pytest.raises(SystemExit, match=f"^curation: {message}"):
        select(*args)
    assert not (tmp_path / "out").exists()


DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Labelled(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(1280.0).view(40, 32) % 7, torch.arange(40) % 2), batch_size=20)

    val_dataloader = train_dataloader


class Bare(Labelled):
    def train_dataloader(self):
        return DataLoader(torch.randn(40, 32))


class Numbers(Labelled):
    def train_dataloader(self):
        x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x[:, 0]), batch_size=20)

    val_dataloader = train_dataloader


class Lists(Labelled):
    def train_dataloader(self):
        return DataLoader([({"a": torch.ones(2), "b": torch.ones(2)}, i % 2) for i in range(40)])


class Empty(Labelled):
    def val_dataloader(self):
        return DataLoader(torch.randn(0, 32))


class Stream(Labelled):
    def train_dataloader(self):
        return DataLoader(type("Rows", (IterableDataset,), {"__iter__": lambda self: iter([])})())


class Trained(LightningDataModule):
    train_dataloader = Labelled.train_dataloader
"""
RECIPE = """
model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}
data: {class_path: data_of_mine.%s}
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false}
"""


NO_CHECKPOINT = "Argument `--ckpt_path` must name a checkpoint of BoringModel, but got"


@pytest.mark.parametrize(
    ("data", "args", "message"),
    [
        ("Bare", [], "The training samples cannot be selected from. A selector needs one integer label per sample"),
        ("Lists", [], "The training samples cannot be selected from. .* tensor"),
        ("Empty", [], "There are no validation samples"),
        ("Stream", [], "A selection needs one map-style `DataLoader` of each part"),
        ("Trained", [], "Trained must have a `val_dataloader`"),
        ("Labelled", ["--layer=nope"], "Argument `--layer` must name a submodule of BoringModel, but got 'nope'"),
        ("Labelled", ["--layer=layer", "--ckpt_path=text"], NO_CHECKPOINT),
        ("Labelled", ["--layer=layer", "--ckpt_path=empty"], NO_CHECKPOINT),
        ("Labelled", ["--layer=layer", "--ckpt_path=bare.pt"], NO_CHECKPOINT + ".*state_dict"),
        ("Labelled", ["--layer=layer", "--ckpt_path=one.pt"], NO_CHECKPOINT),
        ("Labelled", ["--layer=layer", "--ckpt_path=other.pt"], NO_CHECKPOINT + ".*layer.weight"),
        ("Labelled", ["--features=text"], "Argument `--features` must name a .npy file of numbers, but got 'text'"),
        ("Labelled", ["--features=empty"], "Argument `--features` must name a .npy file of numbers, but got 'empty'"),
        ("Labelled", ["--features=z.npz"], "Argument `--features` must name .* but 'z.npz' holds NpzFile"),
        ("Labelled", ["--features=s.npy"], "Argument `--features` must name .* but 's.npy' holds <U1"),
    ],
)  # fmt: skip
def test_data_and_files_that_cannot_be_selected_from_are_said_in_a_line(data, args, message, tmp_path):
    (tmp_path / "data_of_mine.py").write_text(DATA)
    (tmp_path / "recipe.yaml").write_text(RECIPE % data)
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "empty").touch()
    torch.save({"weights": 1}, "bare.pt")
    torch.save(torch.ones(3), "one.pt")
    torch.save({"state_dict": {"w": torch.ones(1)}}, "other.pt")
    np.savez("z.npz", a=np.ones(2))
    np.save("s.npy", np.array(["a", "b"]))
    with pytest.raises(SystemExit, match=f"^curation: {message}"):
        select(*args, config=["--config=recipe.yaml"])


def test_an_interrupted_command_goes_on_with_its_index(tmp_path, monkeypatch, capsys):
    (tmp_path / "data_of_mine.py").write_text(DATA)
    (tmp_path / "recipe.yaml").write_text(RECIPE % "Labelled")
    np.save("f.npy", np.random.default_rng(0).random((40, 3)))

    def run(*args):
        select("--features=f.npy", "--budget=0.2", *args, config=["--config=recipe.yaml"])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "measure", interrupted)
        with pytest.raises(SystemExit, match="the same command goes on where it was"):
            run()
    made = (tmp_path / "out" / "index.parquet").read_bytes()
    (tmp_path / "given.npz").unlink()
    run("--probe=sklearn.neighbors.KNeighborsClassifier", "--picture=p.png")
    assert "8 of 40 samples kept" in capsys.readouterr().out
    assert np.load("given.npz")["seed"] == 1
    assert Path("seeds.txt").read_text().split() == ["0", "1", "1"]  # that of the index is not made again
    assert (tmp_path / "out" / "index.parquet").read_bytes() == made
    refused = pytest.raises(
        SystemExit, match=r"must name a new file, but .* exists, and this command did not make it"
    )
    for other in (["--budget=0.3"], ["--seed=1"], ["--options", '{"power": 3}'], ["--trainer.max_steps=3"]):
        with refused:
            run(*other)
    np.save("f.npy", np.random.default_rng(1).random((40, 3)))  # other features in the same file
    with refused:
        run()
    np.save("f.npy", np.random.default_rng(0).random((40, 3)))
    monkeypatch.setattr(command, "fingerprint", lambda dataset: "other data")
    with refused:
        run()


RECIPES = ["fashion_mnist_selection", "text_selection"]


def test_the_recipe_trains_on_its_own_selection_and_on_a_file(digits):
    recipe = ["--config", "fashion_mnist_selection", "--data.data=digits", *QUIET]
    short = ["--trainer.max_steps=6", "--trainer.val_check_interval=2", "--data.batch_size=16"]
    select(config=recipe, selector="curation.instances.CoverageInstanceSelector")
    index = SelectionIndex.load("out/index.parquet")
    file = ["--trainer.callbacks.selector=null", "--trainer.callbacks.index=out/index.parquet"]
    by_selector = cli.run(["fit", *recipe, *short, "--trainer.callbacks.selector.budget=0.1"])
    by_file = cli.run(["fit", *recipe, *short, *file])
    kept = []
    for run in (by_selector, by_file):
        (selection,) = (c for c in run.trainer.callbacks if type(c).__name__ == "InstanceSelection")
        kept.append(selection.indices.numpy())
        assert run.trainer.global_step == 6
    assert len(kept[0]) == pytest.approx(0.1 * index.size, abs=5)
    np.testing.assert_array_equal(kept[1], index.indices)


@pytest.mark.parametrize("name", RECIPES)
def test_the_arms_differ_in_the_selector_only(name, tmp_path):
    args = [f"--config={find_recipe(name)}"]
    recipe = resolve(args)
    assert list(recipe["arms"])[:4] == ["full", "uniform", "coverage", "graph_attention"]
    classes = {"uniform": "StratifiedRandomSelector", "coverage": "CoverageInstanceSelector",
               "graph_attention": "GraphAttentionInstanceSelector"}  # fmt: skip
    for arm in recipe["arms"]:
        config = configure(args, make_arm(arm, recipe, None), 3, None, tmp_path, "", {})
        selections = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("InstanceSelection")]
        assert config["trainer"]["max_steps"] == recipe["trainer"]["max_steps"]
        if arm == "full":
            assert selections == []
            continue
        (selection,) = selections
        if arm.endswith("_embeddings"):
            assert selection["init_args"]["index"] == f"{arm.removesuffix('_embeddings')}-3.parquet"
            continue
        selector = selection["init_args"]["selector"]
        assert selector["class_path"] == f"curation.instances.{classes[arm]}"
        assert selector["init_args"]["budget"] == 0.04
        assert selector["init_args"]["random_state"] == 3


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
        (["--target", "nowhere.jsonl"], "`--target` must name a file, but there is no 'nowhere.jsonl'"),
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


def files_command(tmp_path, *options):
    cli.main(["select", "--features", str(tmp_path / "x.npy"), "--output", str(tmp_path / "kept.parquet"), *options])


def test_files_are_selected_from_without_a_recipe(tmp_path, capsys):
    x, y = np.random.default_rng(0).standard_normal((600, 5)), np.repeat([0, 1, 2], 200)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    files_command(tmp_path, "--labels", str(tmp_path / "y.npy"), "--memory", "2GB", "--budget", "0.1", "--seed", "3")
    expected = CoverageInstanceSelector(0.1, random_state=3).fit(x, y)
    index = SelectionIndex.load(tmp_path / "kept.parquet")
    assert index.indices.tolist() == expected.sample_indices_.tolist()
    assert index.size == 600
    assert json.loads(index.config)["memory"] == "2GB"
    assert "kept per class: 0: 20 of 200, 1: 20 of 200, 2: 20 of 200" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="`--output` must name a new file"):
        files_command(tmp_path, "--memory", "2GB")


def test_the_shards_of_files_are_kept_until_the_index_is_there(tmp_path, monkeypatch, capsys):
    x = np.random.default_rng(0).standard_normal((900, 5))
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(coverage_shards, "SHARD", 300)
    monkeypatch.setattr(coverage_shards, "fits_at_once", lambda *_: False)
    merge = coverage_shards._Work.merge
    monkeypatch.setattr(coverage_shards._Work, "merge", None)  # fails
    with pytest.raises(TypeError):
        files_command(tmp_path, "--memory", "6GB", "--jobs", "1")
    assert len(list((tmp_path / "kept.parquet.shards").iterdir())) == 3
    monkeypatch.setattr(coverage_shards._Work, "merge", merge)
    monkeypatch.setattr(coverage_shards, "choose", None)  # nothing is chosen again
    files_command(tmp_path, "--memory", "6GB", "--jobs", "1")
    assert "900 rows in 3 shards, 1 at once: about" in capsys.readouterr().out
    assert len(SelectionIndex.load(tmp_path / "kept.parquet").indices) == 36
    assert not (tmp_path / "kept.parquet.shards").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--memory", "much"], "`memory` must be bytes, such as '4GB', but got 'much'"),
        (["--memory", "1MB"], "`memory` must be at least"),
        (["--labels", "y.npy"], "`--labels` needs `--memory`, but got 'y.npy'"),
        (["--jobs", "2"], "`--jobs` needs `--memory`, but got 2"),
        (["--memory", "4GB", "--layer", "net"], "`--layer` must be left out with `--memory`, but got 'net'"),
        (["--memory", "4GB", "--config", "text_selection"], "without a recipe, but got ['--config'"),
        (
            ["--memory", "4GB", "--selector", "curation.instances.StratifiedRandomSelector"],
            "keyword argument 'memory'",
        ),
    ],
)
def test_options_of_files_that_cannot_be_used_are_named(options, error, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    with pytest.raises(SystemExit, match=re.escape(error)):
        files_command(tmp_path, *options)
