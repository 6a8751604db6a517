"""The `curation` command: recipes by name, overrides, and errors that say what to do."""

import sys

import pytest
import yaml

from curation.recipes import catalogue, sources
from curation.recipes.catalogue import find_recipe, recipe_names
from curation.recipes.cli import main as cli

RECIPE = "sft_utility_diversity"


def test_recipes_lists_every_recipe_with_its_first_line(capsys):
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert RECIPE in recipe_names()
    assert all(len(line.split()) > 3 and "#" not in line for line in lines)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_how_to_run_it(name, capsys):
    cli.main(["recipes", name])
    text = capsys.readouterr().out
    assert text == find_recipe(name).read_text()
    header = text[: text.index("\nseed_everything")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"curation fit --config {name}" in header


def test_a_copy_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["recipes", RECIPE, "--copy"])
    cli.main(["recipes", RECIPE, "--copy", "mine.yaml"])
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / f"{RECIPE}.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("edited")
    with pytest.raises(SystemExit, match=r"Argument `--copy` must name a new file, but 'mine.yaml' exists"):
        cli.main(["recipes", RECIPE, "--copy", "mine.yaml"])
    assert (tmp_path / "mine.yaml").read_text() == "edited"
    with pytest.raises(SystemExit, match=r"curation: .*No such file or directory: 'nowhere/mine.yaml'"):
        cli.main(["recipes", RECIPE, "--copy", "nowhere/mine.yaml"])


@pytest.mark.parametrize(
    "args", [["recipes", "nope"], ["fit", "--config", "nope"], ["fit", "--config=nope"], ["fit", "-c", "nope"]]
)
def test_an_unknown_recipe_lists_those_there_are(args):
    with pytest.raises(SystemExit, match=rf"must be one of .*{RECIPE}.*, or a file, but got 'nope'"):
        cli.main(args)


@pytest.mark.parametrize("name", recipe_names())
def test_overrides_survive_print_config(name, tmp_path, capsys):
    def printed(config, *args):
        with pytest.raises(SystemExit) as done:
            cli.main(["fit", "--config", config, *args, "--print_config"])
        assert done.value.code == 0
        return capsys.readouterr().out

    selection = "--trainer.callbacks.class_path=curation.callbacks.UniformSelection"
    first = printed(name, "--trainer.max_steps=7", selection, "--trainer.callbacks.keep=0.5")
    config = yaml.safe_load(first)
    assert config["trainer"]["max_steps"] == 7
    assert config["trainer"]["callbacks"][-1]["init_args"]["keep"] == 0.5
    file = tmp_path / "mine.yaml"
    file.write_text(first)
    assert printed(str(file)) == first
    changed = printed(str(file), "--trainer.max_steps=8")
    assert yaml.safe_load(changed) == {**config, "trainer": {**config["trainer"], "max_steps": 8}}


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == "datasets" else object())
    message = r"Recipes need datasets\. Run `pip install 'lightning-curation\[recipes\]'`"
    with pytest.raises(SystemExit, match=message):
        cli.main(["fit", "--config", RECIPE])
    with pytest.raises(ImportError, match=message):
        cli.run(["fit", "--config", RECIPE])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.callbacks.keep=2", r"Argument `keep` must be in \(0, 1\], but got 2.0\."),
        ("--model.lr=-1", r"Argument `lr` must be (> 0|in \(0, inf\)), but got -1.0\."),
        ("--data.batch_size=0", r"Argument `batch_size` must be (an integer )?>= 1, but got 0\."),
    ],
)
def test_what_a_constructor_refuses_is_said_in_one_line(option, message):
    with pytest.raises(SystemExit, match=f"^curation: {message}$"):
        cli.main(["fit", "--config", RECIPE, option])


def test_only_what_a_recipe_can_do_is_offered(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert "{fit,validate,test}" in out


RULE = """
from curation.callbacks import OnlineSelection
from curation.scoring import per_sample_loss


class HighLoss(OnlineSelection):
    def score(self, trainer, pl_module, batch, sample_ids):
        return per_sample_loss(*self.outputs(trainer, pl_module, batch))
"""


def test_a_rule_of_the_current_folder_takes_the_place_of_the_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    (tmp_path / "my_rule.py").write_text(RULE)
    option = "--trainer.callbacks.class_path=my_rule.HighLoss"
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", "--config", RECIPE, option, "--print_config"])
    assert done.value.code == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [c["class_path"].split(".")[-1] for c in callbacks] == ["ExactResume", "ModelCheckpoint", "HighLoss"]
    assert callbacks[-1]["init_args"]["keep"] == 0.25


def test_a_package_is_found_without_importing_it(monkeypatch):
    assert sources.resolve("some/folder") == "some/folder"
    assert sources.resolve("package:curation.recipes") == str(catalogue.FOLDER)
    with pytest.raises(ImportError, match=r"'no_such_package' is not installed. Run `pip install no-such-package`"):
        sources.resolve("package:no_such_package")
