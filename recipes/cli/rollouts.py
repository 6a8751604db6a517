"""``curation rollouts profile --config RECIPE --output FILE.parquet``: how well a policy does on every prompt.

Every training prompt is answered as often as in training. The file has the pass rate of each, the mean number of
tokens of its answers and their seconds, and is a memory of prompts: ``PromptSampler(start="FILE.parquet")`` leaves
prompts without signal out from the first step on. The same command again, after it was interrupted, goes on.
"""

import argparse
import json
from pathlib import Path

import torch

from curation.recipes.cli.lightning_cli import run
from curation.recipes.rollouts.policy import PolicyModule
from curation.recipes.rollouts.profile import profile
from curation.recipes.rollouts.prompts import Prompts
from curation.records.prompt_memory import PromptMemory
from curation.tables import read_table


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command, and the arguments for the recipe.

    Raises:
        ValueError: If there is no such checkpoint.
    """
    parser = argparse.ArgumentParser("curation rollouts", description=__doc__, allow_abbrev=False)
    parser.add_argument("action", choices=["profile"])
    parser.add_argument("--output", required=True, type=Path, help="Parquet file with a row for each training prompt")
    parser.add_argument("--ckpt_path", help="checkpoint of the policy; without it, the model as the recipe makes it")
    options, overrides = parser.parse_known_args(args)
    if options.ckpt_path is not None and not Path(options.ckpt_path).is_file():
        raise ValueError(f"Argument `--ckpt_path` must name a checkpoint, but there is no {options.ckpt_path!r}.")
    return options, overrides


def main(args: list[str]) -> None:
    """``curation rollouts profile --config RECIPE --output FILE [--ckpt_path CKPT] [overrides]``.

    Raises:
        ValueError: If an option is wrong, or the recipe is none of rollouts.
        OSError: If the output exists or cannot be written.
    """
    options, overrides = parse(args)
    options.output.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the work
    cli = run(overrides, execute=False)
    if not (isinstance(cli.model, PolicyModule) and isinstance(cli.datamodule, Prompts)):
        raise ValueError("Argument `--config` must name a recipe with a PolicyModule and Prompts.")
    settings = json.dumps([options.ckpt_path, *overrides])
    memory = profile(cli.trainer, cli.model, cli.datamodule, options.output, options.ckpt_path, settings)
    print(summary(memory, options.output))


def summary(memory: PromptMemory, path: Path) -> str:
    """How many prompts have signal, and what the answers cost."""
    table, rate = read_table(path), memory.rate
    seconds = float(torch.from_numpy(table["seconds"].to_numpy().copy()).double().sum())
    length = float(torch.from_numpy(table["length"].to_numpy().copy()).mean())
    solved, failed = (float(x.float().mean()) for x in (memory.solved > 0, memory.failed > 0))
    return (
        f"{len(rate):,} prompts, {memory.trials.sum():,.0f} answers, {seconds:.1f} s: pass rate {rate.mean():.3f}, "
        f"{length:.1f} tokens an answer; all right of {solved:.1%} of the prompts, all wrong of {failed:.1%}\n"
        f"memory: {path}"
    )
