"""Models of transformers under the callback: adapters of peft, encoders and decoders, own losses, a policy."""

import pytest
import torch
from helpers import trainer
from lightning.pytorch import LightningModule
from mixture import Mixture, Tokens, error
from torch.utils.data import DataLoader
from transformers import (
    Cohere2MoeConfig,
    Cohere2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from curation.callbacks import GlobalBatchLoadBalancing
from curation.recipes.rollouts.language_models import FromScratch
from curation.recipes.rollouts.policy import PolicyModule
from curation.recipes.rollouts.prompts import Prompts
from curation.recipes.rollouts.tasks import Puzzles

SIZES = {"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 6}
SIZES |= {"num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
SWITCH = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_experts": 4}
SWITCH |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
SWITCH |= {"decoder_start_token_id": 0, "pad_token_id": 0}


def qwen(**options):
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | options))


class Language(LightningModule):
    """A model that is given its batches by name; its gradients are kept."""

    def __init__(self, model, **named):
        super().__init__()
        self.model, self.named, self.gradients = model, named, []

    def training_step(self, batch, batch_idx):
        return self.model(**batch, **self.named).loss

    def on_before_optimizer_step(self, optimizer):
        named = self.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def rows(n=8, width=10):
    ids = torch.randint(3, 64, (n, width), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def balance(module, data, size=4, batch=2, **options):
    callback = GlobalBatchLoadBalancing(0.5, **options)
    run = trainer(callback, max_steps=1, accumulate_grad_batches=size)
    run.fit(module, DataLoader(data, batch))
    return callback, run


# ---------------------------------------------------------------------- adapters


def adapted(kind):
    """A mixture with one layer, whose router is trained by an adapter, and the beginning of the adapter's name."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if kind == "linear":
        module = Mixture(layers=1, lr=0.0)
        config = peft.LoraConfig(target_modules=["router"], init_lora_weights=False)
        return peft.inject_adapter_in_model(config, module), [dict(row) for row in Tokens(8, 2)], "router.lora"
    options = {"target_parameters": ["gate.weight"]} if kind == "parameter" else {"modules_to_save": ["gate"]}
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options)
    return Language(peft.get_peft_model(qwen(), config)), rows(), "gate"


@pytest.mark.parametrize("kind", ["parameter", "linear", "whole"])
def test_the_adapter_of_a_router_gets_the_exact_gradient(kind):
    gradients = {}
    for estimator in ("prepass", "running", "deferred"):
        module, data, name = adapted(kind)
        balance(module, data, estimator=estimator)
        gradients[estimator] = {n: g for n, g in module.gradients[0].items() if name in n and g.any()}
    assert gradients["prepass"]
    assert error(gradients["deferred"], gradients["prepass"]) < 1e-5
    assert error(gradients["running"], gradients["prepass"]) > 1e-3


# ---------------------------------------------------------------------- encoders and decoders


def pairs(decoder_mask):
    draw = torch.Generator().manual_seed(0)
    result = []
    for n, m in zip((3, 9, 5, 7), (4, 2, 9, 6), strict=True):
        ids, labels = (torch.randint(3, 64, (9,), generator=draw) for _ in range(2))
        row = {"input_ids": ids, "attention_mask": (torch.arange(9) < n).long(), "labels": labels}
        if decoder_mask:
            row["decoder_attention_mask"] = (torch.arange(9) < m).long()
        else:
            row["labels"] = labels.masked_fill(torch.arange(9) >= m, -100)
        result.append(row)
    return result


@pytest.mark.parametrize("estimator", ["running", "deferred"])
@pytest.mark.parametrize("how", ["decoder_attention_mask", "labels", "function"])
def test_the_mask_of_the_encoder_does_not_count_for_the_decoder(how, estimator):
    torch.manual_seed(0)
    module = Language(SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SWITCH)))
    data = pairs(how != "labels")

    def both(batch):
        return batch["attention_mask"], batch["decoder_attention_mask"]

    options = {"mask": both} if how == "function" else {}
    callback, _ = balance(module, data, size=1, batch=4, estimator=estimator, **options)
    assert callback.window.tokens().tolist() == [3 + 9 + 5 + 7, 4 + 2 + 9 + 6]


def test_one_mask_for_an_encoder_and_a_decoder_is_refused_and_so_are_two_for_one_model():
    module = Language(SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SWITCH)))
    with pytest.raises(ValueError, match=r"Argument `mask` must return a pair, .* but it returned Tensor"):
        balance(module, pairs(True), mask=lambda batch: batch["attention_mask"])
    with pytest.raises(ValueError, match=r"Argument `mask` must return a pair, .* but it returned tuple"):
        balance(Language(qwen()), rows(), mask=lambda batch: (torch.ones(2, 10), torch.ones(2, 10)))


# ---------------------------------------------------------------------- what a model does itself


def test_a_loss_that_is_switched_on_in_the_call_is_refused():
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM adds a load-balancing loss itself: call it without"):
        balance(Language(qwen(), output_router_logits=True), rows())
    module = Language(qwen(router_aux_loss_coef=0.0), output_router_logits=True)
    balance(module, rows())
    assert module.gradients
    assert not module.model._forward_pre_hooks


@pytest.mark.parametrize("selection", ["softmax", "sigmoid"])
def test_a_router_with_two_functions_is_balanced_by_the_one_that_it_uses(selection):
    torch.manual_seed(0)
    config = Cohere2MoeConfig(**SIZES, head_dim=8, layer_types=["full_attention"], expert_selection_fn=selection)
    module, outputs = Language(Cohere2MoeForCausalLM(config)), []
    (gate,) = (m for name, m in module.named_modules() if name.endswith("gate") and m.__class__.__name__ != "Linear")
    gate.register_forward_hook(lambda _, args, output: outputs.append(output))
    _, run = balance(module, rows(2), size=1)
    logits, _, chosen = outputs[0]
    scores = logits.softmax(1) if selection == "softmax" else logits.sigmoid()
    p, f = scores / scores.sum(1, keepdim=True), chosen.flatten().bincount(minlength=6) / chosen.numel()
    assert float(run.callback_metrics["experts/loss"]) == pytest.approx(6 * (f * p.mean(0)).sum().item(), rel=1e-5)


# ---------------------------------------------------------------------- a policy


class Questions(Puzzles):
    """Questions of several lengths, and rewards that hardly move the weights."""

    scored = 0

    def question(self, i):
        return "abc"[i % 3] * (1 + i % 5) + "="

    def score(self, i, answer):
        self.scored += 1
        return 1e-6 * (self.scored % 2)


class Source(FromScratch):
    def build(self):
        return qwen(vocab_size=41).eval(), super().build()[1]


def policy_gradient(estimator, token_budget):
    """The gradient of the router, and the tokens that counted."""
    options = {"rollouts": 4, "max_new_tokens": 4, "temperature": 1e-6, "seed": 0, "max_grad_norm": 1e9}
    policy = PolicyModule(Source(), token_budget=token_budget, lr=1e-12, **options)
    callback = GlobalBatchLoadBalancing(1.0, estimator=estimator)
    run = trainer(callback, max_steps=1, limit_val_batches=0)
    run.fit(policy, Prompts(Questions(size=16), batch_size=8))
    return policy.model.model.layers[0].mlp.gate.weight.grad, callback.window


def test_the_balance_of_a_policy_does_not_depend_on_the_passes_of_an_update():
    whole, one = policy_gradient("running", 4096)
    cut, several = policy_gradient("deferred", 48)
    running, _ = policy_gradient("running", 48)
    assert one.size == 1
    assert several.size > 3
    assert one.tokens().tolist() == several.tokens().tolist()  # padding, which differs, does not count
    assert one.counts.tolist() == several.counts.tolist()
    assert error({"gate": cut}, {"gate": whole}) < 1e-4
    assert 0.5 < float(running.norm() / whole.norm()) < 2
