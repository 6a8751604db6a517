"""A trained module in a form that is loaded without this package."""

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from curation.files import replacing
from curation.sample_ids import split_sample_ids
from curation.scoring import hugging_face_models


def export(
    module: LightningModule, datamodule: LightningDataModule | None, folder: Path, adapters: bool = False
) -> list[str]:
    """Write what a module has trained.

    Args:
        module: The module with its trained weights, on the CPU.
        datamodule: Data set up for a fit: an example for ``forward``, and the tokenizer.
        folder: The folder to write to.
        adapters: Write the adapters of a ``PeftModel`` alone, not merged into its weights.

    Returns:
        Names of the folders and files that were written.

    Raises:
        ValueError: If there is nothing to export, or no example for it.
    """
    names = hugging_face_models(module)
    models = {name: module.get_submodule(name) for name in names}
    if adapters and not any(hasattr(model, "merge_and_unload") for model in models.values()):
        raise ValueError("Argument `--adapters` needs a model with adapters, but the run has none.")
    if not models:
        return [_export_program(module, datamodule, folder)]
    tokenizer = find_tokenizer(module, datamodule)
    for name, model in models.items():
        place = folder if len(models) == 1 else folder / name
        _plain(model, adapters).save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
    return ["a Hugging Face model" if len(models) == 1 else ", ".join(names)]


def find_tokenizer(*owners: Any) -> Any:
    """The first tokenizer of transformers among the attributes of some objects; None where there is none."""
    from transformers import PreTrainedTokenizerBase

    for owner in owners:
        for value in vars(owner).values() if owner is not None else []:
            for candidate in (value, getattr(value, "tokenizer", None)):
                if isinstance(candidate, PreTrainedTokenizerBase):
                    return candidate
    return None


def _plain(model: Any, adapters: bool) -> Any:
    """A model that ``save_pretrained`` takes: with its adapters merged, and without the marks of GGUF files."""
    if hasattr(model, "merge_and_unload"):
        if adapters:
            return model
        model = copy.deepcopy(model).merge_and_unload()
    if getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config"):
        return model
    config = copy.deepcopy(model.config)  # the weights are read and are fp32; the marks would make saving raise
    vars(config).pop("quantization_config", None)
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh.to(next(model.parameters()).dtype)


class _Forward(nn.Module):
    """The ``forward`` of a module, without the rest of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        """What the module gives."""
        return self.module(x)


def _export_program(module: LightningModule, datamodule: LightningDataModule | None, folder: Path) -> str:
    if datamodule is None:
        raise ValueError("Argument `run` must have a data module, whose first batch is the example to export with.")
    datamodule.setup("fit")
    batch, _ = split_sample_ids(next(iter(datamodule.train_dataloader())))
    x = batch[0] if isinstance(batch, (list, tuple)) else None
    if not isinstance(x, Tensor):
        raise ValueError(
            f"Argument `run` must be of a Hugging Face model, or of a module whose `forward` takes the first field "
            f"of a batch, but `{type(module).__name__}` has batches of {type(batch).__name__}."
        )
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(_Forward(module.eval()), (x[:2],), dynamic_shapes=(rows,))
    with replacing(folder / "model.pt2") as file:
        torch.export.save(program, file)
    return "model.pt2"
