"""`curation audit`: from the record of a run to the files that other runs read."""

import html
import json
import warnings
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow.csv
import pytest
import torch
from helpers import Classifier, data, loader, trainer
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from curation.audit import CorrectedDataset, Corrections, ThresholdSamples
from curation.batch import SampleIds
from curation.callbacks import (
    DynamicDataPruning,
    InstanceSelection,
    SelectedDataModule,
    SelectionLedger,
    TrainingDynamics,
    UniformSelection,
    WeightedLoss,
)
from curation.instances.selection_index import SelectionIndex
from curation.recipes import cli
from curation.recipes.audit.audit import Audit, groups_of
from curation.recipes.audit.page import as_page, sample_html
from curation.recipes.audit.pictures import draw_audit
from curation.recipes.cli import audit as audit_command
from curation.recipes.image_classification import Images
from curation.records import SampleDynamics
from curation.records.dynamics import COLUMNS, COUNTS
from curation.samplers import DynamicDataPruningSampler
from curation.tables import read_table

RECIPE = [
    "--config",
    "fashion_mnist_audit",
    "--data.data=digits",
    "--data.threshold_samples=0.1",
    "--trainer.logger=false",
]
WRONG = 60  # of 400


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def dynamics(seed=0, **changes):
    """Margins of 400 samples of three classes, of which the first 60 have wrong labels, far from the others."""
    generator = np.random.default_rng(seed)
    margin = np.concatenate([generator.normal(-6, 1, WRONG), generator.normal(4, 1, 400 - WRONG)])
    probability = 1 / (1 + np.exp(-margin))
    columns = {name: np.zeros(400, np.int64 if name in COUNTS else np.float32) for name in COLUMNS}
    columns |= {
        "visits": np.full(400, 5), "margin": margin, "probability": probability, "loss": -np.log(probability),
        "label": generator.integers(0, 3, 400), "suggested": generator.integers(0, 3, 400),
        "rival_probability": 1 - probability, "probability_deviation": generator.random(400),
        "right": np.where(margin > 0, 5, 0),
    }  # fmt: skip
    return SampleDynamics({**columns, **changes})


@pytest.fixture
def record():
    dynamics().save("record.parquet")
    return dynamics()


def test_the_table_has_the_most_suspicious_first_and_every_sample_once(record, capsys):
    cli.main(["audit", "record.parquet", "--output=audit.parquet"])
    table = {name: column.to_numpy() for name, column in zip(*columns_of("audit.parquet"), strict=True)}
    assert sorted(table["sample_id"]) == list(range(400))
    assert set(table["sample_id"][:WRONG]) == set(range(WRONG))
    assert (np.diff(table["score"]) <= 0).all()
    count = int(table["suspect"].sum())
    assert abs(count - WRONG) <= 4
    assert table["suspect"][:count].all()
    for name in ("margin", "label", "suggested", "probability"):
        np.testing.assert_array_equal(table[name], record[name][table["sample_id"]])
    printed = capsys.readouterr().out
    assert printed.startswith("400 samples, of which 0 never visited; 5 to 5 visits each\nwrong labels: ")
    assert "by mixture" in printed
    cli.main(["audit", "record.parquet", "--output=audit.csv"])
    as_text = pyarrow.csv.read_csv("audit.csv")
    assert as_text["sample_id"].to_pylist() == table["sample_id"].tolist()


def columns_of(file):
    table = read_table(file)
    return table.column_names, table.columns


def test_threshold_samples_say_how_many_and_are_not_ranked(record):
    ids = np.arange(0, WRONG, 2)
    np.save("ids.npy", ids)
    cli.main(["audit", "record.parquet", "--output=audit.parquet", "--threshold=ids.npy"])
    table = dict(zip(*columns_of("audit.parquet"), strict=True))
    assert set(table["sample_id"].to_numpy()[-30:]) == set(ids)
    assert np.isnan(table["score"].to_numpy()[-30:]).all()
    assert table["threshold_sample"].to_numpy()[-30:].all()
    audit = Audit(record, ids)
    assert audit.estimate.low <= 30 <= audit.estimate.high
    assert audit.estimate.method == "30 threshold samples"
    assert not audit.suspects[ids].any()


def test_samples_that_were_never_visited_come_last_and_are_no_suspects():
    margin = dynamics()["margin"].copy()
    margin[:10] = np.nan
    audit = Audit(dynamics(margin=margin, visits=np.where(np.isnan(margin), 0, 5)), count=400 - 10)
    assert audit.table()["sample_id"][-10:].tolist() == list(range(10))
    assert not audit.suspects[:10].any()
    assert "of which 10 never visited" in audit.summary()[0]


def test_an_estimate_that_is_not_supported_is_refused_and_said():
    noise = np.random.default_rng(0).normal(0, 1, 400)
    audit = Audit(dynamics(margin=noise))
    assert audit.estimate is None
    assert audit.count == 0
    assert "wrong labels: not estimated, since two components of the margins are" in audit.summary()[1]
    learned = Audit(dynamics(suggested=(dynamics()["label"] + 1) % 3))
    assert learned.refused == "errors seem to go from each class to one other, which margins do not count"
    losses = Audit(dynamics(margin=np.full(400, np.nan), label=np.full(400, -1), probability=np.full(400, np.nan)))
    assert losses.refused == "only labels that are classes have margins"
    assert losses.regions == {}
    assert losses.table()["score"][0] == dynamics()["loss"].max()


def test_what_a_selection_kept_is_compared_with_the_suspects(record):
    kept = np.where(np.arange(400) < WRONG, 9, np.arange(400) % 2)
    audit = Audit(record, count=WRONG, kept=kept)
    assert audit.summary()[-1] == "suspects: 15.0% of all, 100.0% of the 60 kept most; 170 were never kept"


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, text):
        self.text.append(text)


HOSTILE = [
    "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "<!-- <b> & &amp; \0 \u202e </td></table>",
    "</title><iframe srcdoc='<script>'>",
]


def test_the_page_shows_any_text_as_text(record):
    samples = [{"text": HOSTILE[i % 5] + str(i), "label": 0} for i in range(400)]
    audit = Audit(record, pairs=np.array([[0, 1]]), groups={"source": np.array([HOSTILE[i % 5] for i in range(400)])})
    page = as_page(audit, draw_audit(audit), HOSTILE[0], samples, rows=10)
    parsed = Elements()
    parsed.feed(page)
    assert set(parsed.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "ul", "li", "img", "table", "tr", "th", "td",
        "pre",
    }  # fmt: skip
    assert set(parsed.attributes) <= {"lang", "charset", "http-equiv", "content", "class", "alt", "src"}
    shown = "".join(parsed.text)
    for i in audit.order[:10].tolist():
        assert HOSTILE[i % 5].replace("&amp;", "&amp;") + str(i) in shown
    assert "default-src 'none'" in html.unescape(page)
    assert 'src="http' not in page


def test_samples_are_shown_as_what_they_are():
    image = sample_html((torch.arange(16.0).view(1, 4, 4), 3))
    assert image.startswith('<img class="sample" alt="" src="data:image/png;base64,')
    assert sample_html(("a <b>", 1)) == "<pre>a &lt;b&gt;</pre>"
    assert sample_html((torch.tensor([1.0, 2.5]), 1)) == "<pre>1 2.5</pre>"
    assert sample_html({"label": 1, "x": torch.zeros(20)}).endswith("0 …</pre>")
    assert sample_html({"text": "y" * 3000}).endswith("y …</pre>")
    assert sample_html(([[1], [2, 3]], 0)) == "<pre>[[1], [2, 3]]</pre>"

    class Tokens:
        def decode(self, ids, skip_special_tokens):
            return f"<{ids}>"

    assert sample_html({"input_ids": [1, 2]}, Tokens()) == "<pre>&lt;[1, 2]&gt;</pre>"


def test_parts_are_divided_by_fields_and_by_length():
    samples = [{"source": "ab"[i % 2], "input_ids": [0] * (i + 1)} for i in range(40)]
    groups = groups_of(samples, ["source", "length"])
    assert groups["source"].tolist() == ["a", "b"] * 20
    assert [np.sum(groups["length"] == name) for name in np.unique(groups["length"])] == [10] * 4
    with pytest.raises(ValueError, match="must name a field of the samples, source, input_ids, but got 'x'"):
        groups_of(samples, ["x"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The record of the recipe on digits with planted errors."""
    folder = tmp_path_factory.mktemp("trained")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    path = f"--trainer.callbacks.path={folder / 'record.parquet'}"
    cli.main(["fit", *RECIPE, *quiet, path, "--trainer.max_epochs=8", f"--trainer.default_root_dir={folder}"])
    return folder / "record.parquet"


def test_the_recipe_finds_the_labels_that_are_wrong(trained, capsys):
    cli.main(
        ["audit", str(trained), "--output=audit.parquet", "--page=audit.html", "--picture=audit.png", "--duplicates",
         "--rows=5", "--apply=drop", "--index=kept.parquet", "--baseline=random.parquet", *RECIPE]
    )  # fmt: skip
    images = Images(data="digits", label_noise=0.2, threshold_samples=0.1)
    images.setup("fit")
    table = dict(zip(*columns_of("audit.parquet"), strict=True))
    wrong = images.corrupted.numpy()
    first = table["sample_id"].to_numpy()[:50]
    assert wrong[first].mean() > 0.9
    assert wrong.mean() < 0.3
    threshold = images.train.dataset.ids
    audit = Audit(SampleDynamics.load(trained), threshold)
    usual = np.ones(len(wrong), bool)
    usual[threshold] = False
    assert audit.estimate.low <= wrong[usual].sum() <= audit.estimate.high
    kept, at_random = SelectionIndex.load("kept.parquet"), SelectionIndex.load("random.parquet")
    assert len(kept) == len(at_random) == len(wrong) - audit.count
    assert wrong[kept.indices].mean() < wrong[at_random.indices].mean() / 2
    assert json.loads(kept.config)["count"] == audit.count
    assert matplotlib.image.imread("audit.png").shape[1] == 1200
    assert Path("audit.html").read_text().count('<img class="sample"') >= 5
    plain = Images(data="digits", label_noise=0.2)
    plain.setup("fit")
    run = trainer(InstanceSelection(index="kept.parquet"), max_epochs=1)
    with warnings.catch_warnings(record=True) as told:
        run.fit(OfDigits(), plain.train_dataloader())
    assert not [str(warning.message) for warning in told if "other samples" in str(warning.message)]


def test_the_first_rows_go_to_the_logger_where_asked_for(trained, monkeypatch):
    logged = {}
    monkeypatch.setattr(audit_command, "log_table", lambda trainer, name, columns, rows: logged.update({name: rows}))
    monkeypatch.setattr(audit_command, "log_image", lambda trainer, name, image: logged.update({name: image}))
    for log in ([], ["--log"]):
        cli.main(["audit", str(trained), f"--output=audit{len(log)}.csv", "--rows=3", *log, *RECIPE])
        assert set(logged) == ({"audit/suspects", "audit/map"} if log else set())
    first = pyarrow.csv.read_csv("audit1.csv").slice(0, 3).to_pylist()
    assert [row[0] for row in logged["audit/suspects"]] == [row["sample_id"] for row in first]


class OfDigits(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def test_a_record_of_other_data_is_refused_by_name(trained):
    for change, message in (
        ("--data.holdout=0.5", r"record\.parquet' is a record of 1294 samples, but the recipe has 719"),
        ("--data.seed=1", r"record\.parquet' is a record of other samples than the recipe's: give the overrides"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["audit", str(trained), "--output=audit.csv", *RECIPE, change])
    assert not Path("audit.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=audit.txt"], r"`--output` must end with .csv or .parquet, but got 'audit.txt'"),
        (["--output=a.csv", "--apply=drop"], "`--index` must be given with `--apply`, but got None"),
        (["--output=a.csv", "--baseline=b.parquet"], "`--baseline` must be given with `--apply drop`, but got None"),
        (["--output=a.csv", "--duplicates"], "`--config` must name the recipe of the run with `--duplicates`"),
        (["--output=a.csv", "--count=500"], r"`count` must be an integer in \[0, 401\) or None, but got 500"),
        (["--output=a.csv", "--count=0", "--apply=drop", "--index=k.parquet"], "`--apply` needs suspects"),
        (["--output=a.csv", "--count=400", "--apply=drop", "--index=k.parquet"], "must leave samples, but all are"),
        (["--output=a.csv", "--weight=-1"], r"`--weight` must be in \[0, inf\), but got -1.0"),
        (["--output=a.csv", "--threshold=record.parquet"], "`--threshold` must name a .npy file of integers"),
        (
            ["--output=a.csv", "--threshold=floats.npy"],
            r"must hold integers \[M\], but 'floats.npy' holds float64 \[2\]",
        ),
        (["--output=a.csv", "--threshold=large.npy"], "`threshold` must hold samples of the record, 0 to 399"),
        (["--output=record.parquet"], "`--output` must name a new file, but 'record.parquet' exists"),
    ],
)
def test_wrong_options_are_named_and_leave_no_file(record, arguments, message):
    np.save("floats.npy", np.zeros(2))
    np.save("large.npy", np.array([400]))
    before = set(Path().iterdir())
    with pytest.raises(SystemExit, match=message):
        cli.main(["audit", "record.parquet", *arguments])
    assert set(Path().iterdir()) == before


def test_what_is_applied_is_read_by_what_trains(tmp_path):
    """Drop, weigh and relabel, from one record of the helpers' data."""
    dynamics = TrainingDynamics("record.parquet")
    ledger = SelectionLedger("ledger")
    trainer(UniformSelection(keep=0.5), ledger, dynamics, max_epochs=4).fit(Classifier(), loader())
    for action in ("drop", "weigh", "relabel"):
        cli.main(
            ["audit", "record.parquet", f"--output={action}.csv", "--count=7", f"--apply={action}", "--ledger=ledger",
             f"--index={action}.parquet", "--weight=0.25"]
        )  # fmt: skip
    audit = Audit(SampleDynamics.load("record.parquet"), count=7)
    suspects = np.flatnonzero(audit.suspects)

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

    selected = SelectedDataModule(Data(), "drop.parquet")
    assert selected.train_dataloader().sampler.indices.tolist() == sorted(set(range(64)) - set(suspects))

    weighed = SampleIds(CorrectedDataset(data(), "weigh.parquet"))
    assert [weighed[i][2] for i in range(64)] == [0.25 if i in suspects else 1.0 for i in range(64)]
    weights = WeightedLoss(2)
    trainer(weights, max_epochs=1).fit(Classifier(), DataLoader(weighed, 8))
    assert weights.batches == 8

    relabelled = SampleIds(CorrectedDataset(data(), Corrections.load("relabel.parquet")))
    suggested = audit.dynamics["suggested"]
    for i, (_, y) in enumerate(data()):
        assert int(relabelled[i][1]) == (suggested[i] if i in suspects else int(y))
    pruning = DynamicDataPruning()
    rounds = DynamicDataPruningSampler(relabelled, 8)
    trainer(pruning, max_epochs=2).fit(Classifier(), DataLoader(relabelled, 8, sampler=rounds))
    assert pruning.batches == 16
    kept = torch.utils.data.Subset(relabelled, SelectionIndex.load("drop.parquet").indices.tolist())
    rounds = DynamicDataPruningSampler(kept, 8)
    assert rounds.size == 57


def test_threshold_samples_of_a_recipe_are_those_of_its_data_set():
    images = Images(data="digits", threshold_samples=0.1)
    images.setup("fit")
    assert isinstance(images.train.dataset, ThresholdSamples)
    assert len(images.train.dataset.ids) == round(0.1 * len(images.train))
    with pytest.raises(ValueError, match=r"Argument `threshold_samples` must be in \[0, 1\), but got 1"):
        Images(data="digits", threshold_samples=1)
