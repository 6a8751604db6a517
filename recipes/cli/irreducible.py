"""``curation irreducible``: the loss of every training sample by a model that was trained on held-out data.

``curation irreducible --config RECIPE --ckpt_path HOLDOUT.ckpt --output irreducible.pt`` scores the training set of a
recipe in order (arXiv 2206.07137). ``HardSampleSelection(score="reducible_loss", irreducible="irreducible.pt")``
subtracts it.
"""

import argparse
import io
from pathlib import Path

import torch

from curation.files import replacing
from curation.recipes.cli.lightning_cli import run
from curation.recipes.irreducible_losses import irreducible_losses


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command, and the arguments for the recipe.

    Raises:
        ValueError: If there is no checkpoint.
        FileExistsError: If the output exists.
    """
    parser = argparse.ArgumentParser("curation irreducible", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a model trained on held-out data")
    parser.add_argument("--output", required=True, type=Path, help="file for the losses, fp32 [N] by sample id")
    options, overrides = parser.parse_known_args(args)
    if not Path(options.ckpt_path).is_file():
        raise ValueError(f"Argument `--ckpt_path` must name a checkpoint, but there is no {options.ckpt_path!r}.")
    if options.output.exists():
        raise FileExistsError(f"Argument `--output` must name a new file, but {str(options.output)!r} exists.")
    return options, overrides


def main(args: list[str]) -> None:
    """``curation irreducible --config RECIPE --ckpt_path CKPT --output FILE [overrides]``.

    Raises:
        ValueError: If the checkpoint is missing, or not every sample can be scored.
        OSError: If the output exists or cannot be written.
    """
    options, overrides = parse(args)
    options.output.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the work
    cli = run(overrides, execute=False)
    if cli.datamodule is None:
        raise ValueError("Argument `--config` must name a recipe with a data module.")
    losses = irreducible_losses(cli.trainer, cli.model, cli.datamodule, options.ckpt_path)
    buffer = io.BytesIO()
    torch.save(losses, buffer)  # to a full disk it would be an error that names no file
    with replacing(options.output) as new:
        new.write_bytes(buffer.getvalue())
    print(f"Irreducible losses of {len(losses)} samples, mean {losses.nanmean():.3f}, in {options.output}.")
