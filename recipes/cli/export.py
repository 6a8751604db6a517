"""``curation export RUN --to FOLDER``: the trained model of a run, to be loaded without this package.

A Hugging Face model becomes a folder for ``from_pretrained``, with its tokenizer; any other becomes ``model.pt2`` for
``torch.export.load``, which takes the inputs of the module's ``forward`` and any number of rows.
"""

import argparse
from pathlib import Path

from curation.recipes.cli.lightning_cli import run
from curation.recipes.exporting import export


def parse(args: list[str]) -> argparse.Namespace:
    """The options of the command.

    Raises:
        ValueError: If the run has no configuration or no checkpoint, or it is not certain which one.
        FileExistsError: If the folder to write to has files.
    """
    parser = argparse.ArgumentParser("curation export", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run, which holds config.yaml and checkpoints")
    parser.add_argument("--to", required=True, type=Path, help="folder to write, new or empty")
    parser.add_argument("--checkpoint", type=Path, help="a file; by default checkpoints/last.ckpt of the run")
    parser.add_argument("--adapters", action="store_true", help="write adapters (LoRA) alone, not merged")
    options = parser.parse_args(args)
    if not (options.run / "config.yaml").is_file():
        versions = ", ".join(str(file.parent) for file in sorted(options.run.glob("*/config.yaml")))
        raise ValueError(
            f"Argument `run` must be the folder of a run of `curation fit`, but {str(options.run)!r} has no "
            "config.yaml" + (f"; there is one in {versions}." if versions else ".")
        )
    if options.checkpoint is None:
        found = sorted(options.run.rglob("*.ckpt"))
        last = [file for file in found if file.stem == "last"] or found
        if len(last) != 1:
            names = ", ".join(str(file) for file in last) or "none"
            hint = "" if found else " FinalCheckpoint among its callbacks would have saved one."
            raise ValueError(f"Argument `--checkpoint` must name a checkpoint of the run, which has {names}.{hint}")
        options.checkpoint = last[0]
    if not options.checkpoint.exists():
        raise ValueError(f"Argument `--checkpoint` must name a file, but there is no {str(options.checkpoint)!r}.")
    if options.to.is_dir() and any(options.to.iterdir()):
        raise FileExistsError(f"Argument `--to` must name a new or empty folder, but {str(options.to)!r} has files.")
    return options


def main(args: list[str]) -> None:
    """``curation export RUN --to FOLDER [--checkpoint FILE] [--adapters]``.

    Raises:
        ValueError: If the run, or what it trained, cannot be exported.
        OSError: If the folder has files or cannot be written.
    """
    options = parse(args)
    options.to.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the work
    nothing = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.limit_val_batches=0"]
    cli = run(["--config", str(options.run / "config.yaml"), *nothing], execute=False)
    cli.trainer.validate(cli.model, cli.datamodule, ckpt_path=str(options.checkpoint), verbose=False)
    written = export(cli.model, cli.datamodule, options.to, options.adapters)
    print(f"{options.checkpoint} as {', '.join(written)} in {options.to}.")
