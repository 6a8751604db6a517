"""Every mixture of experts of the installed transformers: its router's probabilities and counts, or a refusal.

What an expert really gets is found out by changing its weights: the tokens whose output changes went through it.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from curation.experts.load_balancing import expert_counts, raw_scores
from curation.experts.router_statistics import router_statistics
from curation.experts.routers import find_routers, selection_bias

TOKENS, EXPERTS = (2, 9), 8
SEQ2SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
SIZES = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "max_seq_len", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "layer_group_size"), 4),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "linear_head_dim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_value_head_dim", "d_kv", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **{"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_dense_layers": 1, "sparse_step": 2},
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers", "zero_expert_num", "o_groups"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "chunk_size"), 8),
    **dict.fromkeys(("q_lora_rank", "index_head_dim", "router_hidden_size"), 16),
    **{"mamba_d_state": 4, "mamba_dt_rank": 4, "index_n_heads": 2, "index_topk": 4, "expert_capacity": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "router_jitter_noise": 0.0},
    "enable_moe_block": True,
}
LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "head_dim": 16}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 8}
OPTIONS = {  # what sizes of their own need
    "Cohere2Moe": {"expert_selection_fn": "sigmoid"},
    "Dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "BailingHybrid": {"layer_group_size": 2, "n_group": 4, "topk_group": 2},
    "DeepseekV2": {"num_experts_per_tok": 2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "Dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Dots3NoteText": {f"swa_{name}": value for name, value in LATENT.items()},
    "Gemma4Text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **{"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 16},
    },
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": EXPERTS},
    "HunYuanMoEV1": {"head_dim": 8},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 1},
    "KimiLinear": {"layer_types": ["linear_attention", "full_attention"] * 2, "n_group": 4, "topk_group": 2},
    "Lfm2Moe": {"layer_types": 4 * ["full_attention"], "num_dense_layers": 1},
    "Qwen4ExpText": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 4, "indexer_compress_ratio": 2},
    },
    "Zaya": {"num_experts_per_tok": 1},
}
REFUSED = {
    "Doge": "'auto' finds none",
    "NllbMoe": "its output names fewer experts of a token than it gives weights to",
    "Zaya": "its output does not tell which tokens skip all experts",
}
# Scores of routers whose experts are not given weights, or other ones.
SCORES = {"Dbrx": "softmax", "JetMoe": "softmax", "Llama4Text": "sigmoid", "SwitchTransformers": "softmax"}
SCORES |= {"Phimoe": "softmax"}  # its weights are of a sampled choice


def families():
    """Types of language models whose code has experts."""
    mixture = re.compile(r"^class \w*(Experts|MoE|Moe\w*Block|Router|TopKGating)\b", re.MULTILINE)
    names = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    )
    for kind in names:
        room = model_type_to_module_name(kind)
        path = Path(transformers.__file__).parent / "models" / room / f"modeling_{room}.py"
        if path.exists() and mixture.search(path.read_text()):  # not imported, which would take a while
            yield kind


def family(kind):
    """The name, the configuration and the model of a type; where it holds a vision model, too, those of its text."""
    config = type(CONFIG_MAPPING[kind]().get_text_config())
    auto = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM
    cls = auto._model_mapping[config]
    return config.__name__.removesuffix("Config"), config, cls[0] if isinstance(cls, tuple) else cls


def tiny(name, config, cls):
    plain = config().to_dict()
    names = set(plain) - set(config.attribute_map)
    options = {key: value for key, value in SIZES.items() if key in names and plain.get(key) is not None}
    if plain.get("kv_lora_rank"):
        options["num_key_value_heads"] = 4
    torch.manual_seed(0)
    model = cls(config(**options | {"pad_token_id": 0} | OPTIONS.get(name, {}))).eval()
    assert sum(p.numel() for p in model.parameters()) < 1e7
    for _, p in sorted(model.named_parameters()):
        if p.is_floating_point():
            nn.init.normal_(p, std=0.3) if p.dim() > 1 else None
    return model


def forward(model, modules):
    """The arguments and the output of each module."""
    calls, hooks = {}, []
    for at, module in modules.items():

        def record(_, args, named, output, at=at):
            calls.setdefault(at, (args, named, output))

        hooks.append(module.register_forward_hook(record, with_kwargs=True))
    ids = torch.randint(3, 64, TOKENS, generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    for hook in hooks:
        hook.remove()
    return calls


def flat(output):
    return (output[0] if isinstance(output, tuple) else output).flatten(0, -2)


@torch.no_grad()
def really_used(block, experts, call):
    """Which experts a token went through: bool ``[N, E]``, for the experts that have weights."""
    args, named, _ = call
    again = flat(block(*args, **named))
    count = len(experts) if isinstance(experts, (nn.ModuleDict, nn.ModuleList)) else EXPERTS
    columns = []
    for e in range(count):
        kept = {name: p.clone() for name, p in experts.named_parameters()}
        for name, p in experts.named_parameters():
            if isinstance(experts, (nn.ModuleDict, nn.ModuleList)):
                p.mul_((list(experts.children())[e] is experts.get_submodule(name.split(".")[0]) and -2) or 1)
            else:
                part = p.unflatten(0, (count, -1)) if p.size(0) % count == 0 else p  # LongCat's has identities, too
                part[e].mul_(-2)
        columns.append((flat(block(*args, **named)) != again).any(1))
        for name, p in experts.named_parameters():
            p.copy_(kept[name])
    return torch.stack(columns, 1)


def experts_of(model, router):
    """The block of a router and the module of its experts."""
    parts = router.name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        block = model.get_submodule(".".join(parts[:n]))
        for name in ("experts", "input_linear"):
            if isinstance(getattr(block, name, None), nn.Module):
                return block, getattr(block, name)
    raise LookupError(router.name)


def statistics_of_all(model):
    routers = find_routers(model)
    calls = forward(model, {router.name: router.module for router in routers})
    return [router_statistics(router, [calls[router.name][2]]) for router in routers]


@pytest.mark.parametrize("kind", families())
def test_probabilities_and_counts_are_those_of_the_experts(kind):
    name, config, cls = family(kind)
    model = tiny(name, config, cls)
    if name in REFUSED:
        with pytest.raises(ValueError, match=rf"({name}|layers\.\d).*{REFUSED[name]}"):
            statistics_of_all(model)
        return
    routers = find_routers(model)
    for router in routers:
        bias = selection_bias(router)
        if bias is not None:
            bias.copy_(torch.linspace(-0.2, 0.2, len(bias)))
    around = {router.name: experts_of(model, router) for router in routers}
    with_router = [experts for _, experts in around.values()]
    for at, module in model.named_modules():  # DeepSeek-V4 has layers whose experts are given by the token
        if at.rpartition(".")[2] == "experts" and not any(module is experts for experts in with_router):
            gate = getattr(model.get_submodule(at.rpartition(".")[0]), "gate", None)
            assert "Hash" in type(gate).__name__ or isinstance(module.input_linear, nn.Module)
    modules = {router.name: router.module for router in routers}
    modules |= {f"{name} block": block for name, (block, _) in around.items()}
    modules |= {f"{name} experts": experts for name, (_, experts) in around.items()}
    calls = forward(model, modules)
    for router in routers:
        output, (block, experts) = calls[router.name][2], around[router.name]
        counts = router_statistics(router, [output]).counts
        logits, indices = router.read(output)
        p = router.probabilities(logits, None, output)
        torch.testing.assert_close(p.sum(1), torch.ones(18))
        if f"{router.name} block" in calls:
            used = really_used(block, experts, calls[f"{router.name} block"]).sum(0).tolist()
        else:  # JetMoe's attention calls its experts itself, and tells them how many tokens each has
            _, used = calls[f"{router.name} experts"][0]
        assert sum(used) > 0
        assert counts[: len(used)].tolist() == used
        assert expert_counts(indices, len(counts)).tolist() == counts.tolist()
        assert counts.sum() <= 18 * indices.size(1)
        assert name == "SwitchTransformers" or counts.sum() == 18 * indices.size(1)
        if name in SCORES:
            scores = logits.softmax(1) if SCORES[name] == "softmax" else raw_scores(logits, SCORES[name])
            torch.testing.assert_close(p, scores / scores.sum(1, keepdim=True))
            continue
        args, named, _ = calls[f"{router.name} experts"]
        given = [t for t in (*args, *named.values()) if isinstance(t, torch.Tensor) and t.shape == indices.shape]
        (chosen,) = (t for t in given if not t.is_floating_point())
        (weights,) = (t for t in given if t.is_floating_point())
        share = p.gather(1, chosen)
        shares = (t / t.sum(1, keepdim=True) for t in (share, weights))
        torch.testing.assert_close(*shares, atol=1e-5, rtol=1e-4)
