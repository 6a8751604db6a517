"""Lightning's command line with named recipes: ``curation fit``, ``validate`` and ``test``."""

from typing import Any

from curation.recipes.catalogue import with_recipe_files
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
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    class SaveConfig(SaveConfigCallback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if trainer.loggers:  # else it would go into the current folder, where the user's own may be
                super().setup(trainer, pl_module, stage)

    class CLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--arms", type=dict | None, help="for `curation compare` only")

        def instantiate_classes(self) -> None:
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
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "curation", "description": DESCRIPTION},
    )


def first_cause(error: BaseException) -> BaseException:
    """The error of a constructor, which the parser wraps in the errors of everything that it tried."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error
