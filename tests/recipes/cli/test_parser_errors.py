"""Errors of the command line are a line or two: file, line, option, and the nearest name that there is."""

import re

import pytest

from curation.recipes import cli
from curation.recipes.catalogue import find_recipe

RECIPE = find_recipe("fashion_mnist_noisy").read_text()
IMAGES = "curation.recipes.image_classification.Images"
MODEL = "curation.recipes.image_classification.ImageClassifier"
RULE = "curation.callbacks.HardSampleSelection"


def line_of(text, part):
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


def said(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", *args])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) <= 5
    return shown.strip()


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        ("max_steps:", "max_stepz:", "`trainer.max_stepz` is no option; the nearest is `trainer.max_steps`."),
        ("arms:", "armz:", "`armz` is no option; the nearest is `arms`."),
        ("label_noise:", "label_nois:",
         f"`data.label_nois` is no option of {IMAGES}; the nearest is `data.label_noise`."),
        ("rule: top", "rulee: top",
         f"`trainer.callbacks.rulee` is no option of {RULE}; the nearest is `trainer.callbacks.rule`."),
        ("keep: 0.1", "keep: lots",
         f"`trainer.callbacks.keep` of {RULE}: Expected a <class 'float'>. Got value: lots"),
        ("max_steps: 1000", "max_steps: many", "`trainer.max_steps`: Expected a <class 'int'>. Got value: many"),
        ("label_noise: 0.4", "label_noise: abc",
         f"`data.label_noise` of {IMAGES}: Expected a <class 'float'>. Got value: abc"),
    ],
)  # fmt: skip
def test_an_error_in_a_file_names_file_line_and_option(right, wrong, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = re.sub(rf"^( *){right}", rf"\g<1>{wrong}", RECIPE, flags=re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(text)
    assert said(capsys, "--config=mine.yaml") == f"curation: mine.yaml, line {line_of(text, wrong)}: {sentence}"


@pytest.mark.parametrize(
    ("right", "wrong", "place", "sentence"),
    [
        ("keep: 0.1", "keep: 2", True, r"Argument `keep` must be in \(0, 1\], but got 2.0."),
        ("label_noise: 0.4", "label_noise: 1.5", True, r"Argument `label_noise` must be in \[0, 1\), but got 1.5."),
        ("seed: 0", "seed: -1", True, r"Argument `seed` must be an integer in .*, but got -1."),
        ("seed: 0\n", "seed: -1\n", False, r"Argument `seed` must be .*, but got -1."),  # which of them?
    ],
)
def test_what_a_constructor_refuses_in_a_file_is_told_with_its_line(
    right, wrong, place, sentence, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace(right, wrong, 1)
    if not place:
        text = text.replace("        rule: top", "        rule: top\n        seed: -1", 1)
    (tmp_path / "mine.yaml").write_text(text)
    where = f"mine.yaml, line {line_of(text, wrong)}: " if place else ""
    with pytest.raises(SystemExit, match=f"^curation: {where}{sentence}$"):
        cli.main(["fit", "--config=mine.yaml"])


@pytest.mark.parametrize("wrong", ["curation.callbacks.HardSampleSelectio", "no_such_package.Rule"])
def test_a_class_that_there_is_not_is_named(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace(f"- class_path: {RULE}", f"- class_path: {wrong}", 1)
    (tmp_path / "mine.yaml").write_text(text)
    shown = said(capsys, "--config", "mine.yaml")
    assert shown.startswith(f"curation: mine.yaml, line {line_of(text, wrong)}: `trainer.callbacks` of {wrong}: ")


def test_what_is_no_yaml_is_told_with_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("  max_steps: 1000", "  max_steps: [1")
    (tmp_path / "mine.yaml").write_text(text)
    after = line_of(text, "max_steps: [1") + 1
    shown = said(capsys, "-c", "mine.yaml")
    assert shown.startswith(f"curation: mine.yaml, line {after}, column 21: expected")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--trainer.max_stepz=3", "`trainer.max_stepz` is no option; the nearest is `trainer.max_steps`."),
        ("--modell.lr=3", "`modell` is no option; the nearest is `model`."),
        ("--model.channel=3", f"`model.channel` is no option of {MODEL}; the nearest is `model.channels`."),
        ("--trainer.callbacks.kep=3",
         f"`trainer.callbacks.kep` is no option of {RULE}; the nearest is `trainer.callbacks.keep`."),
        ("--trainer.max_steps=x", "`trainer.max_steps`: Expected a <class 'int'>. Got value: x"),
        ("--data.sampler=nope.X", f"`data.sampler` of {IMAGES}: No module named 'nope'"),
        ("--qqqqq=1", "`qqqqq` is no option."),
    ],
)  # fmt: skip
def test_an_error_on_the_command_line_names_the_option_and_no_file(option, sentence, capsys):
    assert said(capsys, "--config=fashion_mnist_noisy", option) == f"curation: {sentence}"


@pytest.mark.parametrize(("option", "near"), [("--seed=3", "seeds"), ("--method=loss", "methods"), ("--job", "jobs")])
def test_an_option_of_compare_that_is_misspelt_is_told_the_nearest(option, near):
    name = option.partition("=")[0]
    with pytest.raises(SystemExit, match=f"^curation: `{name}` is no option; the nearest is `--{near}`"):
        cli.main(["compare", "fashion_mnist_noisy", option])


def test_compare_says_the_same():
    with pytest.raises(
        SystemExit, match=r"^curation: fashion_mnist_noisy: `trainer.max_stepz` is no option; the nearest"
    ):
        cli.main(["compare", "fashion_mnist_noisy", "--trainer.max_stepz=3"])
