"""The recipes of rewards: whole runs, a kill, and what their arms change."""

from pathlib import Path

import matplotlib.image
import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from policies import smollm2

from curation.recipes import cli
from curation.recipes.catalogue import find_recipe
from curation.recipes.compare.arms import configure, make_arm, resolve
from curation.recipes.rollouts.solve_picture import PARTS, SolvePicture, draw

FEW = [
    "--model.warmup_steps=5", "--model.eval_rollouts=4", "--data.task.size=16", "--data.batch_size=6",
    "--data.seen=6", "--data.warmup.size=20", "--trainer.max_epochs=2", "--trainer.max_steps=-1",
    "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false",
]  # fmt: skip


def test_the_recipe_runs_and_draws_what_is_solved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = cli.run(["fit", f"--config={find_recipe('rollouts_tiny')}", *FEW]).trainer
    assert {"val_pass_at_1", "val_hard_pass_at_4", "seen_pass_at_4"} <= run.callback_metrics.keys()
    wandb.finish()
    assert any(isinstance(logger, WandbLogger) for logger in run.loggers)
    (picture,) = (c for c in run.callbacks if isinstance(c, SolvePicture))
    spent = [p["rollouts"] for p in picture.points]
    assert spent == sorted(set(spent))
    assert spent[0] == 0
    image = matplotlib.image.imread("runs/rollouts_tiny.png")
    assert image.shape[1] > image.shape[0] > 300
    assert image.std() > 0.05
    figure = draw(picture.points)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["pass@1", "pass@4"]
    assert [line.get_label() for line in figure.axes[0].lines] == [label for label, _, _ in PARTS.values()]


def test_a_killed_run_of_the_recipe_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """From a checkpoint of every step, which is what a kill leaves."""
    monkeypatch.chdir(tmp_path)
    saves = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.filename={step}",
    ]
    saves += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_top_k=-1"]

    def fit(folder, *more):
        few = [*FEW, "--trainer.logger=false", f"--trainer.default_root_dir={folder}", *saves]
        run = cli.run(["fit", f"--config={find_recipe('rollouts_tiny')}", *few, *more]).trainer
        (optimizer,) = run.optimizers
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return run.global_step, run.callback_metrics, [*run.lightning_module.state_dict().values(), *moments]

    steps, metrics, weights = fit("whole")
    assert steps == 4
    for step in (1, 2, 3):
        (saved,) = Path("whole").glob(f"**/step={step}.ckpt")
        again = fit(f"from-{step}", f"--ckpt_path={saved}")
        assert again[0] == steps
        assert all(torch.equal(a, b) for a, b in zip(again[2], weights, strict=True))
        assert {k: v for k, v in again[1].items() if k.startswith("val")} == {
            k: v for k, v in metrics.items() if k.startswith("val")
        }


@smollm2
def test_the_recipe_of_a_real_model_runs(gguf_read_once, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, from the [demo] extra")
    monkeypatch.chdir(tmp_path)
    few = ["--model.source.num_layers=1", "--model.warmup_steps=1", "--model.eval_rollouts=2", "--data.batch_size=2"]
    few += ["--data.task.size=8", "--data.warmup.size=64", "--data.holdout=0.25", "--trainer.max_epochs=1"]
    few += ["--trainer.max_steps=-1", "--trainer.val_check_interval=3", "--trainer.enable_progress_bar=false"]
    run = cli.run(["fit", f"--config={find_recipe('rollouts')}", *few]).trainer
    wandb.finish()
    assert 4 <= float(run.callback_metrics["rollouts/per_prompt"]) <= 8
    assert Path("runs/rollouts.png").is_file()


def test_the_arms_differ_in_who_gets_how_many_rollouts_only(tmp_path):
    args = [f"--config={find_recipe('rollouts_tiny')}"]
    recipe = resolve(args)
    for arm in recipe["arms"]:
        made = configure(args, make_arm(arm, recipe, None), 3, None, tmp_path, "", {})
        callbacks = [c for c in made["trainer"]["callbacks"] if c["class_path"].endswith("AdaptiveRollouts")]
        assert len(callbacks) == (arm in ("equal_treatment", "hardness_weighted", "hardness_weighted_std"))
        assert all((c["init_args"]["n"], c["init_args"]["budget"]) == (8, 16) for c in callbacks)
        options = made["model"]["init_args"]
        prompts = options["fill"] or made["data"]["init_args"]["batch_size"]  # with signal, or of a step
        spent = 16 * 50 if callbacks else options["rollouts"] * prompts
        assert spent == (32 if arm == "full" else 16) * 50
        assert (made["data"]["init_args"]["sampler"] is not None) == (
            arm in ("signal", "streaks", "thompson", "drop_solved")
        )
        assert made["data"]["init_args"] | {"batch_size": 50, "sampler": None} == recipe["data"]["init_args"]
        assert made["seed_everything"] == 3


def test_the_arms_of_the_pool_differ_in_which_prompts_are_answered_only(tmp_path):
    args = [f"--config={find_recipe('rollouts_pool')}"]
    recipe = resolve(args)
    for arm in recipe["arms"]:
        made = configure(args, make_arm(arm, recipe, None), 3, None, tmp_path, "", {})
        options, data = made["model"]["init_args"], made["data"]["init_args"]
        ruled = arm in ("streaks", "thompson", "drop_solved")
        assert (data["sampler"] is not None) == ruled
        assert sum(c["class_path"].endswith(".DynamicDataPruning") for c in made["trainer"]["callbacks"]) == ruled
        if ruled:
            assert data["sampler"]["init_args"]["rule"] == arm
            assert data["sampler"]["init_args"]["answers"] == options["rollouts"] == 8
        assert (options["fill"] is not None) == (arm == "full")
        assert data["batch_size"] == (48 if arm == "full" else 24)
        same = {"batch_size": 24, "sampler": recipe["data"]["init_args"]["sampler"]}
        assert data | same == recipe["data"]["init_args"]
        changed = {k for k, v in options.items() if v != recipe["model"]["init_args"][k]}
        assert changed == {"full": {"fill"}, "maxrl": {"baseline"}, "max_variance": {"keep", "kept_answers"}}.get(
            arm, set()
        )
