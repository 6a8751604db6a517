"""The trained model of a run, loaded where this package is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from curation.recipes import cli

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
LOGGER = ["--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=runs"]


def fit(recipe, *options):
    """The folder of a run of a recipe."""
    cli.main(["fit", "--config", recipe, *QUIET, *LOGGER, *options])
    return next(Path("runs").rglob("config.yaml")).parent


def outputs_elsewhere(script, *arguments):
    """What a script prints to a file in a process that cannot import this package."""
    block = "import sys; sys.modules['curation'] = None; import torch\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", block + script, *arguments, "out.pt"], check=True, env=environment)
    return torch.load("out.pt")


def trained(run):
    """The module of a run with its last weights."""
    nothing = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.limit_val_batches=0"]
    made = cli.run(["--config", str(run / "config.yaml"), *nothing], execute=False)
    made.trainer.validate(made.model, made.datamodule, ckpt_path=str(next(run.rglob("last.ckpt"))), verbose=False)
    return made.model.eval()


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_images(capsys):
    run = fit("fashion_mnist_pruning", "--data.data=digits", "--trainer.max_epochs=1")
    cli.main(["export", str(run), "--to", "out"])
    assert "last.ckpt as model.pt2 in out" in capsys.readouterr().out
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(x, "x.pt")
    script = (
        "program = torch.export.load('out/model.pt2').module()\n"
        "torch.save(program(torch.load('x.pt')).detach(), sys.argv[-1])"
    )
    torch.testing.assert_close(outputs_elsewhere(script), trained(run)(x).detach(), rtol=0, atol=1e-5)


LORA = "{rank: 2, targets: [q_proj]}"
CAUSAL = (
    "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained('out').eval()\n"
    "torch.save(model(torch.arange(3, 12)[None]).logits.detach(), sys.argv[-1])"
)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (
            "sft_utility_diversity",
            [
                "--model.num_layers=1",
                "--trainer.max_steps=1",
                "--data.max_samples=64",
                "--trainer.limit_val_batches=1",
            ],
        ),
        ("sft_utility_diversity", ["--model.num_layers=1", "--data.max_samples=64", f"--model.lora={LORA}"]),
        ("rollouts_tiny", ["--model.warmup_steps=1"]),
    ],
)
def test_language_models(recipe, options):
    run = fit(recipe, "--trainer.max_steps=1", "--trainer.limit_val_batches=1", *options)
    cli.main(["export", str(run), "--to", "out"])
    module = trained(run)
    expected = module.model(torch.arange(3, 12)[None]).logits.detach()
    largest = float(expected.abs().max())
    torch.testing.assert_close(outputs_elsewhere(CAUSAL), expected, rtol=0, atol=1e-5 * max(1.0, largest))
    if recipe.startswith("sft"):  # read from GGUF
        script = (
            "from transformers import AutoTokenizer\n"
            "torch.save(AutoTokenizer.from_pretrained('out')('to be').input_ids, sys.argv[-1])"
        )
        assert outputs_elsewhere(script) == module.trainer.datamodule.text("to be").input_ids


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"'none' has no config\.yaml"):
        cli.main(["export", "none", "--to", "out"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({}))
    with pytest.raises(SystemExit, match="`--checkpoint` must name a checkpoint of the run, which has none"):
        cli.main(["export", "run", "--to", "out"])
    for name in ("a", "b"):
        (tmp_path / f"run/{name}.ckpt").write_text("")
    with pytest.raises(SystemExit, match=r"which has run/a\.ckpt, run/b\.ckpt"):
        cli.main(["export", "run", "--to", "out"])
    with pytest.raises(SystemExit, match="`--to` must name a new or empty folder, but 'run' has files"):
        cli.main(["export", "run", "--to", "run", "--checkpoint", "run/a.ckpt"])


def test_a_resumed_fit_of_the_command_line_goes_on_in_its_wandb_run():
    command = ["fit", "--config", "fashion_mnist_pruning", *QUIET, "--data.data=digits"]

    def run(*options):
        cli.main([*command, *options])
        sys.modules["wandb"].finish()

    run("--trainer.max_epochs=1")
    (last,) = Path("runs").rglob("last.ckpt")
    run("--trainer.max_epochs=2", f"--ckpt_path={last}")
    run("--trainer.max_epochs=2", f"--ckpt_path={last}", "--same_wandb_run=false")
    ids = [folder.name.split("-")[3] for folder in sorted(Path("runs").glob("wandb/offline-run-*"))]
    assert len(set(ids)) == 2
    assert len(ids) == 3
