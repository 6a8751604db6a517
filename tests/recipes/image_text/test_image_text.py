"""Tagged pictures and a dual encoder, on PNG files of scikit-learn's digits and on emoji where there are any."""

import json
import math
import os
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from processes import on_two_ranks
from torch.nn.functional import normalize

from curation.callbacks import ConceptCoverageMonitor
from curation.recipes import cli
from curation.recipes.image_text import ImageTextModel, TaggedPictures, emoji, tagged_pictures
from curation.recipes.image_text.image_text_model import augment
from curation.recipes.image_text.picture_files import decode, load_tagged_pictures
from curation.recipes.image_text.tagged_pictures import tokenize
from curation.samplers.concept_aware import ConceptAwareSampler

datasets = pytest.importorskip("datasets", reason="needs datasets, from the [recipes] extra")

EMOJI = Path(__file__).parents[3] / emoji.EMOJI
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip
SMALL = {"width": 16, "dimension": 64, "words": 512}


@pytest.fixture(autouse=True)
def cache_of_its_own_and_one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that threads would only wait for each other
    yield
    torch.set_num_threads(threads)


def write(folder, digits, images, **changes):
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as file:
        for i, (digit, image) in enumerate(zip(digits, images, strict=True)):
            Image.fromarray((255 - 15.9 * image).astype(np.uint8)).save(folder / f"{i}.png")
            tags = [NAMES[digit], "odd" if digit % 2 else "even", *["prime"] * (digit in (2, 3, 5, 7))]
            row = {"file_name": f"{i}.png", "text": f"a handwritten {digit}", "tags": tags, **changes}
            file.write(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """96 digits to train on, of which 10 are held out, and 33 to validate on; the training set has no nine."""
    load_digits = pytest.importorskip(
        "sklearn.datasets", reason="needs scikit-learn, from the [demo] extra"
    ).load_digits
    images, digits = load_digits().images, load_digits().target
    path = tmp_path_factory.mktemp("digits")
    train = np.flatnonzero(digits != 9)[:96]
    write(path / "train", digits[train], images[train])
    write(path / "validation", digits[-33:], images[-33:])
    return str(path)


def options(folder, *more):
    return [
        "--config=image_text", f"--data.data={folder}", "--data.batch_size=8", "--data.image_size=16",
        "--data.sampler.super_batch_size=24", *(f"--model.{k}={v}" for k, v in SMALL.items()),
        *(f"--trainer.{k}={str(v).lower()}" for k, v in QUIET.items()), "--trainer.callbacks=null", *more,
    ]  # fmt: skip


def test_the_recipe_trains_and_tests_on_a_folder_of_pictures(folder):
    monitor = "--trainer.callbacks+=curation.callbacks.ConceptCoverageMonitor"
    more = ["--trainer.max_steps=7", "--trainer.val_check_interval=3", "--model.micro_batch=3", monitor]
    run = cli.run(["fit", *options(folder, *more)])
    assert run.trainer.global_step == 7
    (monitor,) = (c for c in run.trainer.callbacks if isinstance(c, ConceptCoverageMonitor))
    assert monitor.visits.sum() == 7 * 8
    metrics = {k: float(v) for k, v in run.trainer.callback_metrics.items()}
    for name in ("val_retrieval", "val_tags", "val_tags_head", "val_tags_tail"):
        assert 0 <= metrics[name] <= 1
    assert math.isfinite(metrics["val_loss"])
    tested = cli.run(["test", *options(folder)])
    assert {f"test_{k}" for k in ("loss", "retrieval", "tags", "tags_head", "tags_tail")} <= {
        *tested.trainer.callback_metrics
    }


@pytest.mark.parametrize("arm", ["full", "uniform", "diversity", "frequency", "diversity_fresh"])
def test_an_arm_is_what_its_name_says(arm):
    from curation.recipes.compare import arms

    recipe = arms.resolve(["--config=image_text"])
    changes = arms.make_arm(arm, recipe, None)
    config = arms.configure(["--config=image_text"], changes, 3, None, Path("here"), "group", {})
    sampler = config["data"]["init_args"]["sampler"]
    assert (sampler is None) == (arm == "full")
    if sampler:
        assert sampler["init_args"]["seed"] == 3
        assert sampler["init_args"]["visit_penalty"] == (0.1 if arm == "diversity_fresh" else 0)
        objective = sampler["init_args"]["objective"]
        first = "curation.samplers.concept_choice.FirstCome"
        assert (objective["class_path"] == first) if arm == "uniform" else (objective == arm.split("_")[0])
    assert "curation.callbacks.ConceptCoverageMonitor" in {c["class_path"] for c in config["trainer"]["callbacks"]}


def slow_metrics(model, data):
    """One picture, one text and one concept at a time."""
    model.eval()
    rows = [data.val[i] for i in range(len(data.val))]
    with torch.no_grad():
        image = [normalize(model.images(row["image"][None])[0], dim=0) for row in rows]
        text = [normalize(model.texts(row["tokens"][None])[0], dim=0) for row in rows]
    words = [tuple(row["tokens"].tolist()) for row in rows]
    s = np.array([[float(a @ b) for b in text] for a in image])
    n, scale = len(rows), math.exp(model.log_scale.item())
    loss, hits = 0.0, 0
    for matrix in (s, s.T):
        for i in range(n):
            right = [j for j in range(n) if words[j] == words[i]]
            partition = math.log(sum(math.exp(scale * value) for value in matrix[i]))
            loss -= sum(scale * matrix[i][j] - partition for j in right) / len(right)
            hits += int(np.argmax(matrix[i])) in right
    source = load_tagged_pictures(data.data)
    known = {tag for tags in source["train"]["tags"] for tag in tags}
    concepts = [set(tags) & known for tags in source["validation"]["tags"]]
    present = sorted(set().union(*concepts))
    with torch.no_grad():
        names = {tag: normalize(model.texts(tokenize(tag)[None])[0], dim=0) for tag in present}
    counts = {tag: sum(tag in tags for tags in source["train"]["tags"]) for tag in known}
    order = sorted(known, key=lambda tag: (-counts[tag], data.concepts.names.index(tag)))
    hits_by_tag = {tag: [] for tag in present}
    for i in range(n):
        ranked = sorted(present, key=lambda tag: -float(image[i] @ names[tag]))
        for tag in concepts[i]:
            hits_by_tag[tag].append(tag in ranked[: len(concepts[i])])
    share = {tag: np.mean(hits) for tag, hits in hits_by_tag.items()}

    def mean(tags):
        tags = [tag for tag in tags if tag in share]
        return np.mean([share[tag] for tag in tags])

    head = [tag for i, tag in enumerate(order) if i / len(order) < 0.1]
    tail = [tag for i, tag in enumerate(order) if i / len(order) >= 0.5]
    assert len(head) == 2
    assert len(tail) == 6
    return {
        "val_loss": loss / (2 * n), "val_retrieval": hits / (2 * n), "val_tags": mean(present),
        "val_tags_head": mean(head), "val_tags_tail": mean(tail),
    }  # fmt: skip


def fit_and_validate(folder, steps=0, **kwargs):
    seed_everything(3, verbose=False)
    data, model = TaggedPictures(folder, batch_size=8, image_size=16), ImageTextModel(**SMALL, lr=1e-3, micro_batch=5)
    run = Trainer(**QUIET, max_steps=steps, max_epochs=-1, num_sanity_val_steps=0, **kwargs)
    if steps:
        run.fit(model, datamodule=data)
    (metrics,) = run.validate(model, datamodule=data, verbose=False)
    return metrics, model, data


def test_the_metrics_are_those_of_the_whole_validation_set(folder):
    metrics, model, data = fit_and_validate(folder, steps=100)
    expected = slow_metrics(model, data)
    assert metrics == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    assert metrics["val_retrieval"] > 0.5  # chance is 0.1


def test_two_ranks_measure_and_train_alike(folder, tmp_path):
    """33 pictures: a rank sees one of them twice, which must not count."""
    on_two_ranks(__file__, folder, tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected, _, _ = fit_and_validate(folder)
    assert first["before"] == second["before"] == {k: pytest.approx(v, rel=1e-4) for k, v in expected.items()}
    assert first["after"] == second["after"] != first["before"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])


def test_only_what_is_asked_for_is_decoded(folder, monkeypatch):
    asked = []
    real = tagged_pictures.decode
    monkeypatch.setattr(
        tagged_pictures, "decode", lambda file, size: asked.append(Path(file).name) or real(file, size)
    )
    data = TaggedPictures(
        folder, batch_size=8, image_size=16, sampler=lambda c, n: ConceptAwareSampler(c, n, super_batch_size=24)
    )
    data.setup("fit")
    assert asked == []
    batches = list(data.train_dataloader())
    assert len(batches) == 86 // 24
    ids = torch.cat([batch["sample_id"] for batch in batches]).tolist()
    assert asked == [Path(data.train.dataset.files[i]["image"]["path"]).name for i in ids]
    assert batches[0]["image"].shape == (8, 3, 16, 16)
    for i, (text, tags) in enumerate(
        zip(*(load_tagged_pictures(folder)["train"][name] for name in ("text", "tags")), strict=True)
    ):
        assert torch.equal(data.train[i]["tokens"], tokenize(text))
        assert {data.concepts.names[c] for c in data.concepts[i]} == set(tags)
    for i, tags in enumerate(load_tagged_pictures(folder)["test"]["tags"]):
        assert {data.concepts.names[c] for c in data.tags["test"][i].nonzero()} == set(tags)


@pytest.fixture
def few_emoji(tmp_path):
    """Packages with five emoji: one with skin tones, one with a variation selector, one without tags or pictures."""
    place = tmp_path / "node_modules"
    rows = [
        {"label": "wave", "hexcode": "1F44B", "tags": ["hand", "bye"], "skins": [
            {"label": "wave: light", "hexcode": "1F44B-1F3FB"}, {"label": "wave: dark", "hexcode": "1F44B-1F3FF"}]},
        {"label": "heart", "hexcode": "2764", "tags": ["love"]},
        {"label": "rainbow flag", "hexcode": "1F3F3-FE0F-200D-1F308", "tags": ["flag", "love"]},
        {"label": "A", "hexcode": "1F1E6"},
        {"label": "too new", "hexcode": "1FFFF", "tags": ["new"]},
    ]  # fmt: skip
    codes = ["1f44b", "1f44b-1f3fb", "2764-fe0f", "1f3f3-fe0f-200d-1f308", "1f1e6"]
    for style, colour in (("google", "red"), ("twitter", "blue")):
        images = place / f"emoji-datasource-{style}/img/{style}/64"
        images.mkdir(parents=True)
        for code in codes:
            Image.new("RGBA", (64, 64), colour).save(images / f"{code}.png")
    names = place / "emojibase-data/en/data.json"
    names.parent.mkdir(parents=True)
    names.write_text(json.dumps(rows))
    return place


def test_emoji_train_in_one_style_and_are_held_out_in_the_other(few_emoji):
    parts = load_tagged_pictures(str(few_emoji))
    texts = ["wave: hand, bye", "wave: light: hand, bye", "heart: love", "rainbow flag: flag, love"]
    assert parts["train"]["text"] == texts
    assert parts["train"]["tags"][1] == ["hand", "bye"]
    held_out = parts["validation"]["text"][:] + parts["test"]["text"][:]
    assert sorted(held_out) == sorted([texts[0], *texts[2:]])
    for part, colour in (("train", [255, 0, 0]), ("validation", [0, 0, 255])):
        picture = decode(parts[part][0]["image"]["path"], 8)
        assert picture.float().mean((1, 2)).tolist() == colour


@pytest.mark.skipif(
    not (EMOJI / "emojibase-data").exists(),
    reason=f"needs `npm install --prefix .venv {emoji.PACKAGES}`",
)
def test_the_recipe_runs_on_emoji(tmp_path):
    small = [f"--trainer.{k}={str(v).lower()}" for k, v in QUIET.items() if k != "enable_checkpointing"]
    more = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", f"--trainer.default_root_dir={tmp_path}"]
    run = cli.run(["fit", "--config=image_text", f"--data.data={EMOJI}", *small, *more])
    data = run.datamodule
    assert [len(part) for part in (data.train, data.val, data.test)] == [3786, 955, 956]
    assert len(data.concepts.names) == 3610
    assert [int(part.sum()) for part in data.groups.values()] == [3610, 361, 1805]
    counts = data.concepts.frequencies
    head, tail = (counts[data.groups[f"tags_{name}"]] for name in ("head", "tail"))
    assert head.min() >= counts[~data.groups["tags_head"]].max()
    assert tail.max() <= counts[~data.groups["tags_tail"]].min()
    for stage, part in (("val", data.val), ("test", data.test)):
        assert data.tags[stage].any(1).all()
        assert all("twitter" in row["image"]["path"] for row in part.files)
    assert all("google" in row["image"]["path"] for row in data.train.dataset.files)
    assert not {*map(str, data.val.files["image"])} & {*map(str, data.test.files["image"])}
    assert 0 < float(run.trainer.callback_metrics["val_loss"]) < 10


def test_splits_that_are_not_there_are_held_out_by_seed(folder, tmp_path):
    parts = load_tagged_pictures(folder)
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [86, 33, 10]

    def files(seed):
        return [
            {row["image"]["path"] for row in part}
            for part in load_tagged_pictures(str(Path(folder) / "train"), seed).values()
        ]

    first, again, reseeded = files(0), files(0), files(1)
    assert [len(part) for part in first] == [77, 10, 9]
    assert len(set().union(*first)) == 96
    assert first == again != reseeded


def test_pictures_inside_of_the_rows_are_read(monkeypatch, tmp_path):
    """As a data set of the hub holds them."""
    rows = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (8, 8), (i, 0, 9)) for i in range(30)], "text": ["a"] * 30, "tags": [["x"]] * 30},
        features=datasets.Features(
            {"image": datasets.Image(), "text": datasets.Value("string"), "tags": [datasets.Value("string")]}
        ),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=rows))
    data = TaggedPictures("somebody/pictures", batch_size=4, image_size=8)
    data.setup("fit")
    assert data.train.dataset.files[0]["image"]["path"] is None
    reds = {int(data.train[i]["image"][0, 0, 0]) for i in range(len(data.train))}
    assert len(reds) == len(data.train)
    assert data.train[0]["image"][2].unique().tolist() == [9]


def test_a_picture_is_put_on_white_and_its_longer_side_cropped():
    file = BytesIO()
    picture = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (2, 0, 4, 4))
    picture.save(file, "PNG")
    image = decode(file, 4)
    assert image.dtype == torch.uint8
    assert image[:, :, :2].float().mean((1, 2)).tolist() == [255, 0, 0]
    assert image[:, :, 2:].float().mean((1, 2)).tolist() == [255, 255, 255]


def test_texts_are_bags_of_words_and_in_training_a_part_of_them():
    assert torch.equal(tokenize("Waving hand: bye!"), tokenize("waving HAND, bye"))
    assert (tokenize("a " * 50) != 0).sum() == 32
    model = ImageTextModel(**SMALL)
    seen = []
    model.text_tower = torch.nn.Identity()
    model.words.register_forward_hook(lambda m, args, out: seen.append(out))
    tokens = torch.stack([tokenize("one two three"), tokenize("three two one"), tokenize("one"), tokenize("")])
    plain = model.eval().texts(tokens)
    assert torch.equal(plain[0], (seen[0] + seen[1])[0, :3].mean(0))
    torch.testing.assert_close(plain[0], plain[1])
    assert not plain[3].any()
    drawn = torch.stack([model.train().texts(tokens) for _ in range(200)])
    assert torch.equal(drawn[:, 2], plain[2].expand(200, -1))  # never without a word
    assert len(drawn[:, 0].unique(dim=0)) == 7  # all parts of three words


def test_augmentation_moves_and_colours_but_leaves_white():
    torch.manual_seed(0)
    images = torch.ones(6, 3, 32, 32)
    assert torch.equal(augment(images), images)
    images[:, :, 8:24, 8:24] = -0.2
    changed = augment(images)
    assert changed.shape == images.shape
    assert len(changed.flatten(1).unique(dim=0)) == 6
    assert changed.min() > -1
    assert torch.equal(changed[:, :, 0, 0], images[:, :, 0, 0])


def test_the_scale_of_the_logits_stays_below_100():
    model = ImageTextModel(**SMALL)
    model.log_scale.data.fill_(9)
    model.on_train_batch_end(None, None, 0)
    assert model.log_scale.exp().item() == pytest.approx(100)


def test_bad_arguments_are_named(tmp_path, folder, few_emoji):
    for bad in ({"batch_size": 0}, {"seed": -1}, {"image_size": 0}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"Argument `{name}` must be .* but got {value}"):
            TaggedPictures(**bad)
    for bad in ({"lr": 0.0}, {"lr": math.nan}, {"micro_batch": 0}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"Argument `{name}` must be .* but got {value}"):
            ImageTextModel(**bad)
    with pytest.raises(ValueError, match=r"Argument `batch_size` must be at most 86, .* but got 87"):
        TaggedPictures(folder, batch_size=87).setup("fit")
    (few_emoji / "emojibase-data/en/data.json").unlink()
    with pytest.raises(ImportError, match=r"there is no .*data.json. Run `npm install --prefix .* emojibase-data@"):
        load_tagged_pictures(str(few_emoji))


def test_bad_data_are_named(tmp_path, folder):
    images, digits = np.zeros((4, 8, 8)), [1, 2, 3, 4]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "untagged", digits, images, tags=None)
    write(tmp_path / "bare", digits, images, tags=None, text=None, other=1)
    write(tmp_path / "two", digits[:2], images[:2])
    write(tmp_path / "tested" / "test", digits, images)
    for name, message in [
        ("none", "must be a folder or a hub name, but there is no"),
        ("empty", "must name a folder with pictures, but .* has none"),
        ("untagged", "must have the column tags, but `train` of .* has not"),
        ("bare", "must have the column text, tags, but"),
        ("two", "must have 3 pictures to train on, but .* has fewer"),
        ("tested", "must have 3 pictures to train on, but"),
    ]:
        with pytest.raises(ValueError, match=f"Argument `data` {message}"):
            load_tagged_pictures(str(tmp_path / name))


if __name__ == "__main__":
    before, _, _ = fit_and_validate(sys.argv[1], strategy="ddp", devices=2)
    after, model, _ = fit_and_validate(sys.argv[1], steps=3, strategy="ddp", devices=2)
    result = {"before": before, "after": after, "weights": model.state_dict()}
    torch.save(result, Path(sys.argv[2]) / f"{os.environ['RANK']}.pt")
