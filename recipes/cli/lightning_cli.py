"""Lightning's command line with named recipes: ``curation fit``, ``validate`` and ``test``."""

import os
from typing import Any

from curation.files import replacing
from curation.recipes.catalogue import with_recipe_files
from curation.recipes.cli.wandb_run import continue_wandb_run
from curation.recipes.cli.yaml_text import MODE, register_mode
from curation.recipes.sources import require_extra

DESCRIPTION = "See also `curation recipes|compare|report|ledger|irreducible|select --help`."


def run(args: list[str], execute: bool = True, instantiate: bool = True) -> Any:
    """Run Lightning's command line, or only read what it was given.

    Args:
        args: The arguments after ``curation`` in a shell; without the subcommand where ``execute`` is False.
        execute: Run the subcommand. Otherwise only make the trainer, the module and the data module.
        instantiate: Make them. Otherwise only read the configuration.

    Returns:
        The ``LightningCLI``, with ``trainer``, ``model``, ``datamodule`` and ``config``.

    Raises:
        ImportError: If the ``[recipes]`` extra is missing.
        ValueError: If a recipe's name is unknown.
    """
    require_extra()
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    register_mode()

    class SaveConfig(SaveConfigCallback):
        def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if trainer.loggers:  # else it would go into the current folder, where the user's own may be
                folder = run_folder(trainer.loggers[0], trainer.default_root_dir)
                _write(os.path.join(folder, "config.yaml"), self.parser.dump(self.config, skip_unset=False))

    class CLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--arms", type=dict | None, help="for `curation compare` only")
            parser.add_argument(
                "--same_wandb_run",
                type=bool,
                default=True,
                help="with --ckpt_path, go on in the W&B run that it is of",
            )
            if not execute:  # what `fit` takes and writes is read without a subcommand, too
                parser.add_method_arguments(Trainer, "fit", skip=set(LightningCLI.subcommands()["fit"]))

        def instantiate_classes(self) -> None:
            fit = self.config.get("fit")
            if fit is not None and fit.same_wandb_run:
                continue_wandb_run(fit)
            if instantiate:
                super().instantiate_classes()

        def _instantiate_trainer(self, config: dict[str, Any], callbacks: Any) -> Any:
            interval = config.get("val_check_interval")  # which Lightning 2.5 reads as a float, and then refuses
            if isinstance(interval, float) and interval > 1:
                config["val_check_interval"] = int(interval)
            return super()._instantiate_trainer(config, callbacks)

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            # Lightning's own method warns of `args` beside sys.argv, even where they are the same.
            self.config = parser.parse_args(args)

    return CLI(
        args=with_recipe_files(args),
        run=execute,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
        parser_kwargs={
            "prog": "curation",
            "description": DESCRIPTION,
            "parser_mode": MODE,
            **({name: {"parser_mode": MODE} for name in CLI.subcommands()} if execute else {}),
        },
    )


def run_folder(logger: Any, root: str) -> str:
    """The folder that a logger has for this run alone: its own, or that of the run's checkpoints.

    Args:
        logger: The first logger of a trainer, with its run begun.
        root: The trainer's ``default_root_dir``, for a logger without a folder.
    """
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return str(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or root, str(logger.name), version)


def _write(path: str, text: str) -> None:
    """Write a file, which may be the URL of a remote file system."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    files, name = url_to_fs(path)
    if isinstance(files, LocalFileSystem):
        with replacing(path) as new:
            new.write_text(text)
        return
    files.makedirs(os.path.dirname(name), exist_ok=True)
    with files.open(name, "w") as file:
        file.write(text)


def first_cause(error: BaseException) -> BaseException:
    """The error of a constructor, which the parser wraps in the errors of everything that it tried."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error
