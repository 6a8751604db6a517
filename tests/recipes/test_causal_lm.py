"""Log-probabilities to learn by against the model's own logits, for the causal language models of transformers."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from curation.recipes.causal_lm import own_logits
from curation.recipes.rollouts.answers import answer_log_probs, check_sampling
from curation.rollouts.generation import generate, prefill

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FEW = (
    "llama",
    "gpt2",
    "cohere",
    "gemma2",
    "granite",
    "granitemoe",
    "falcon_h1",
    "bert",
    "llama4_text",
    "opt",
    "bart",
    "roberta",
)
FAMILIES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if NIGHTLY else FEW
SIZES = {
    "vocab_size": 41, "hidden_size": 32, "d_model": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48,
    "moe_intermediate_size": 16, "intermediate_size_mlp": 48, "num_hidden_layers": 4, "n_layer": 2, "n_layers": 2,
    "num_layers": 2, "decoder_layers": 2, "encoder_layers": 1, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    "rotary_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_d_state": 8, "mamba_n_groups": 1, "state_size": 8, "num_heads": 8, "n_groups": 1, "expand": 2,
    "vocab_size_per_layer_input": 41, "hidden_size_per_layer_input": 8, "global_head_dim": 8, "is_decoder": True,
    "num_kv_shared_layers": 0,
}  # fmt: skip
CHANGES = {  # what is set for a family alone: what its configuration changes after the head
    "granite": {"logits_scaling": 8.0}, "granitemoe": {"logits_scaling": 8.0},
    "falcon_h1": {"lm_head_multiplier": 2.0},
    "bert": {"is_decoder": False},
}  # fmt: skip


def tiny_models(family):
    """Small models of a family with logits of several units; none where these sizes are not for it."""
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[family]
    for sizes in (SIZES, {k: v for k, v in SIZES.items() if k != "head_dim"}):
        try:
            known = kind().to_dict()
            options = {name: value for name, value in sizes.items() if name in known or hasattr(kind(), name)}
            config = kind(**options | CHANGES.get(family, {}))
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > 3e6:
                continue
            model = AutoModelForCausalLM.from_config(config).eval()
        except Exception:
            continue
        for weight in model.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.2)
        yield model


def outcome(family):
    """What happens with a family: ``"equal"``, ``"no tiny configuration"``, a refusal by name, or what is wrong."""
    text = "no tiny configuration"
    for model in tiny_models(family):
        text = outcome_of(model)
        if "cannot be run" not in text:
            break
    return text


def outcome_of(model):
    name = type(model).__name__
    try:
        logits = own_logits(model)
    except TypeError as refusal:
        return f"refused: {refusal}" if name in str(refusal) else f"wrong: {refusal}"
    generator = torch.Generator().manual_seed(1)
    questions = [torch.randint(2, 41, (n,), generator=generator) for n in (3, 5)]
    answers = [torch.randint(2, 41, (n,), generator=generator) for n in (4, 2)]
    found, _ = answer_log_probs(logits, questions, answers, 0.7)
    expected = []
    for question, answer in zip(questions, answers, strict=True):
        own = model(input_ids=torch.cat([question, answer])[None], use_cache=False).logits[0, len(question) - 1 : -1]
        expected.append((own.float() / 0.7).log_softmax(-1).gather(1, answer[:, None])[:, 0])
    difference = float((found - torch.cat(expected)).abs().max())
    if not difference < 1e-4:
        return f"wrong: log-probabilities differ by {difference}"
    head = logits.head.weight
    if head.requires_grad:
        gradients = [torch.autograd.grad(v.sum(), head, retain_graph=True)[0] for v in (found, torch.cat(expected))]
        if not torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max())):
            return "wrong: gradients of the head differ"
    try:
        check_sampling(logits, 0)
    except TypeError as refusal:
        return f"refused: {refusal}" if name in str(refusal) else f"wrong: {refusal}"
    cache = prefill(model, questions, 0, 64)
    options = {"max_new_tokens": 3, "stop_ids": [], "token_budget": 64, "temperature": 0.7}
    sampled = generate(model, cache, torch.tensor([2, 2]), generator=generator, **options)
    index = sampled.prompt_index.tolist()
    learned, _ = answer_log_probs(logits, [questions[i] for i in index], list(sampled.tokens), 0.7)
    difference = float((learned - sampled.log_probs.flatten()).abs().max())
    return f"equal, {logits.linear}" if difference < 1e-3 else f"wrong: sampled ones differ by {difference}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_models_own_logits(family, record_property):
    text = outcome(family)
    record_property("outcome", text)
    print(f"OUTCOME {family}: {text}".replace("\n", " ")[:300])
    assert not text.startswith("wrong")
    if not NIGHTLY:
        refused = {"bert": "refused: BertLMHeadModel looks ahead", "bart": "refused: Bart", "roberta": "refused: Rob"}
        linear = family in ("llama", "gpt2", "llama4_text", "opt")
        assert text.startswith(refused.get(family, f"equal, {linear}"))
