"""A small mixture-of-experts language model on bytes, and how its experts depend on domains."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from curation.checks import check_integer, check_number
from curation.experts.routers import find_routers
from curation.metrics.experts import ExpertLoad, ExpertSpecialization
from curation.recipes.mean_loss import MeanLoss
from curation.recipes.sources import require_extra


class MixtureLM(LightningModule):
    """A decoder on bytes with experts in every layer: ``Qwen3MoeForCausalLM`` with random weights.

    It adds no load-balancing loss; a callback does. Validation logs ``val_loss``, in nats per byte, and
    ``val_perplexity``; as means over layers ``val_domain_information``, the mutual information of domain and expert
    in bits, and ``val_max_load``, how many times as often as the average expert the busiest one is chosen.

    Args:
        hidden: Width of the model.
        layers: Number of layers.
        heads: Number of attention heads in each layer.
        experts: Number of experts in each layer.
        top_k: Number of experts per byte.
        expert_hidden: Width of an expert.
        lr: Learning rate of AdamW after the warm-up; it falls to 0 along a cosine.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Number of optimizer steps over which the learning rate rises linearly.

    Raises:
        ValueError: If an argument is of the wrong type or out of its range.
        TypeError: If the data module has no domains.
    """

    def __init__(
        self,
        hidden: int = 64,
        layers: int = 4,
        heads: int = 4,
        experts: int = 16,
        top_k: int = 2,
        expert_hidden: int = 64,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        sizes = {"hidden": hidden, "layers": layers, "heads": heads, "experts": experts, "top_k": top_k}
        for name, size in {**sizes, "expert_hidden": expert_hidden}.items():
            check_integer(name, size, 1)
        check_number("lr", lr, "(0, inf)")
        check_number("weight_decay", weight_decay, "[0, inf)")
        check_integer("warmup_steps", warmup_steps, 0)
        if top_k > experts:
            raise ValueError(f"Argument `top_k` must be in [1, experts = {experts}], but got {top_k!r}.")
        if hidden % (2 * heads):
            raise ValueError(f"Argument `hidden` must be a multiple of {2 * heads}, 2 heads, but got {hidden!r}.")
        require_extra()
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        self.save_hyperparameters()
        config = Qwen3MoeConfig(
            vocab_size=256, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, num_experts=experts, num_experts_per_tok=top_k,
            moe_intermediate_size=expert_hidden, norm_topk_prob=True, output_router_logits=False,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model: Any = Qwen3MoeForCausalLM(config)
        self.routers = find_routers(self.model)
        self.val_loss = MeanLoss()

    def setup(self, stage: str) -> None:
        """Make metrics for the domains of the data module."""
        names = getattr(getattr(self.trainer, "datamodule", None), "names", None)
        if not names:
            raise TypeError(
                "MixtureLM needs a data module with `names` of domains, such as "
                "`curation.recipes.mixture_of_experts.Domains`."
            )
        experts, layers = self.hparams["experts"], range(len(self.routers))
        self.loads = nn.ModuleList(ExpertLoad(experts) for _ in layers)
        self.specializations = nn.ModuleList(ExpertSpecialization(len(names), experts) for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, T, 256]`` of the next bytes after bytes int64 ``[B, T]``."""
        return self.model(input_ids=x, use_cache=False).logits

    def loss(self, x: Tensor) -> Tensor:
        """Mean cross-entropy of all bytes but the first of each row."""
        return F.cross_entropy(self(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a micro-batch."""
        loss = self.loss(batch["input_ids"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Enter the loss and the experts that the routers choose."""
        x = batch["input_ids"]
        outputs: list[Any] = []  # one for each router, in their order
        hooks = [r.module.register_forward_hook(lambda *call: outputs.append(call[-1])) for r in self.routers]
        try:
            loss = self.loss(x)
        finally:
            for hook in hooks:
                hook.remove()
        self.val_loss.update(loss, len(x))
        domains = batch["domain"].repeat_interleave(x.size(1))
        for i, (router, output) in enumerate(zip(self.routers, outputs, strict=True)):
            _, indices = router.read(output)
            self.loads[i].update(indices)  # type: ignore[operator]
            self.specializations[i].update(indices, domains)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all processes."""
        loss = self.val_loss.compute()
        information = [metric.compute()["information"] for metric in self.specializations]  # type: ignore[operator]
        loads = [metric.compute()["max_load"] for metric in self.loads]  # type: ignore[operator]
        self.log_dict({"val_loss": loss, "val_domain_information": torch.stack(information).mean()}, prog_bar=True)
        self.log_dict({"val_perplexity": loss.exp(), "val_max_load": torch.stack(loads).mean()})
        for metric in (self.val_loss, *self.loads, *self.specializations):
            metric.reset()

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up and a cosine decay to the last step of the fit."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"], fused=True
        )
        warmup, steps = self.hparams["warmup_steps"], self.trainer.estimated_stepping_batches

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
