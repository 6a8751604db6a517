"""The `curation` command: recipes by name, overrides, and errors that say what to do."""

import pytest
import yaml
from curation.recipes import cli, sources

RECIPE = "sft_utility_diversity"


def test_recipes_lists_every_recipe_with_its_first_line(capsys):
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == cli.recipe_names()
    assert RECIPE in cli.recipe_names()
    assert all(len(line.split()) > 3 and "#" not in line for line in lines)


@pytest.mark.parametrize("name", cli.recipe_names())
def test_a_recipe_says_how_to_run_it(name, capsys):
    cli.main(["recipes", name])
    text = capsys.readouterr().out
    assert text == cli.find_recipe(name).read_text()
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


@pytest.mark.parametrize(
    "args", [["recipes", "nope"], ["fit", "--config", "nope"], ["fit", "--config=nope"], ["fit", "-c", "nope"]]
)
def test_an_unknown_recipe_lists_those_there_are(args):
    with pytest.raises(SystemExit, match=rf"must be one of .*{RECIPE}.*, or a file, but got 'nope'"):
        cli.main(args)


@pytest.mark.parametrize("name", cli.recipe_names())
def test_overrides_survive_print_config(name, tmp_path, capsys):
    def printed(config, *args):
        with pytest.raises(SystemExit) as done:
            cli.main(["fit", "--config", config, *args, "--print_config"])
        assert done.value.code == 0
        return capsys.readouterr().out

    first = printed(name, "--trainer.max_steps=7", "--trainer.callbacks.keep=0.5")
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
    with pytest.raises(
        ImportError, match=r"Recipes need datasets\. Run `pip install 'lightning-curation\[recipes\]'`"
    ):
        cli.main(["fit", "--config", RECIPE])


def test_a_package_is_found_without_importing_it(monkeypatch):
    assert sources.resolve("some/folder") == "some/folder"
    assert sources.resolve("package:curation.recipes") == str(cli.FOLDER)
    with pytest.raises(ImportError, match=r"'no_such_package' is not installed. Run `pip install no-such-package`"):
        sources.resolve("package:no_such_package")
