"""Routers of real mixtures of experts against what their experts are given, and of hand-written ones."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from curation.experts.load_balancing import expert_counts
from curation.experts.routers import Router, find_routers, selection_bias

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {  # attention of DeepSeek
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
SWITCH = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "expert_capacity": 2,
    "router_jitter_noise": 0.0,
}
DBRX = {
    "vocab_size": 64,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 2},
}


@dataclass
class Family:
    name: str
    options: dict
    routers: int
    experts: int
    k: int
    scores: str = "softmax"
    bias: bool = False
    sizes: dict = field(default_factory=lambda: SIZES)

    def model(self):
        config = getattr(transformers, f"{self.name}Config")(**{**self.sizes, **self.options})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModel.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() == 2 and not parameter.any():  # AFMoE starts its routers at zero
                    nn.init.normal_(parameter, std=0.1)
            return model


SIX = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIX_LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
EIGHT = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
FAMILIES = [
    Family("Mixtral", SIX_LOCAL, 3, 6, 2),
    Family("Qwen3Moe", SIX | {"mlp_only_layers": [1], "head_dim": 8}, 2, 6, 2),
    Family("Qwen2Moe", SIX | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 16}, 2, 6, 2),
    Family("Olmoe", SIX | {"num_experts_per_tok": 3}, 3, 6, 3),
    Family(
        "DeepseekV3",
        EIGHT | LATENT | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
        *(2, 8, 2, "sigmoid", True),
    ),
    Family(
        "Glm4Moe",
        EIGHT | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8},
        *(2, 8, 2, "sigmoid", True),
    ),
    Family(
        "GptOss",
        SIX_LOCAL | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        *(3, 6, 2),
    ),
    Family(
        "Llama4Text",
        SIX_LOCAL | {"num_experts_per_tok": 1, "moe_layers": [0, 2], "intermediate_size_mlp": 48, "head_dim": 8},
        *(2, 6, 1, "sigmoid"),
    ),
    Family("SwitchTransformers", {}, 3, 4, 1, sizes=SWITCH),
    Family("Dbrx", {}, 3, 6, 2, sizes=DBRX),
    Family("GraniteMoe", SIX_LOCAL, 3, 6, 2),
    Family("JetMoe", SIX_LOCAL | {"kv_channels": 8}, 6, 6, 2),  # of attention and of what follows it
    Family("Phimoe", SIX_LOCAL, 3, 6, 2),
    Family(
        "Jamba",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        *(2, 6, 2),
    ),
    Family(
        "Ernie4_5_Moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
        *(2, 6, 2, "softmax", True),
    ),
    Family("MiniMax", SIX_LOCAL | {"head_dim": 8}, 3, 6, 2),
    Family("MiniMaxM2", SIX_LOCAL | {"head_dim": 8}, 3, 6, 2, "sigmoid", True),
    Family("Afmoe", SIX | {"num_dense_layers": 1, "head_dim": 8}, 2, 6, 2, "sigmoid", True),
    Family("Lfm2Moe", SIX | {"num_dense_layers": 1, "layer_types": 3 * ["full_attention"]}, 2, 6, 2, "sigmoid", True),
    Family(
        "LongcatFlash",
        LATENT
        | {
            "num_hidden_layers": 4,  # two to a layer
            "n_routed_experts": 6,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 16,
            "ffn_hidden_size": 48,
        },
        *(2, 8, 2, "softmax", True),
    ),
    Family("Flint", SIX | {"mlp_only_layers": [0]}, 2, 6, 2, "sigmoid"),
]


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
biased = pytest.mark.parametrize("family", [f for f in FAMILIES if f.bias], ids=lambda family: family.name)


def forward(model, routers):
    """The input and output of each router, and the inputs of its experts after that."""
    records = {router.name: [] for router in routers}
    hooks = []
    for router in routers:
        block = model.get_submodule(router.name.rpartition(".")[0])
        experts = block.experts if hasattr(block, "experts") else block.input_linear  # JetMoe

        def record(_, inputs, output, to=records[router.name]):
            to += [inputs[0].detach(), output]

        def take(_, inputs, to=records[router.name]):
            to.append(inputs)

        hooks += [router.module.register_forward_hook(record), experts.register_forward_pre_hook(take)]
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    for hook in hooks:
        hook.remove()
    return records


def one_hot(indices, experts):
    """How often each expert is among those of a token: ``[N, E]``; -1 is none."""
    return (indices[..., None] == torch.arange(experts)).sum(1)


def used(name, experts, output, taken):
    """Which experts a token went through, by what they took: ``[N, E]``."""
    if name == "Llama4Text":  # all tokens for each expert, multiplied by zero where it was not chosen
        return taken[0].unflatten(0, (experts, -1)).ne(0).any(-1).T.long()
    if name == "SwitchTransformers":
        return taken[1][:, 0].long()
    if name == "JetMoe":  # tokens in the order of their experts
        of_expert = torch.arange(experts).repeat_interleave(torch.tensor(taken[1]))
        return torch.zeros(18, experts, dtype=torch.long).index_put_((output[1], of_expert), torch.tensor(1))
    return one_hot(taken[1], experts)


@families
def test_a_router_for_each_layer_of_experts_and_what_it_chose(family):
    model = family.model()
    routers = find_routers(model)
    assert len(routers) == family.routers
    assert {router.scores for router in routers} == {family.scores}
    records = forward(model, routers)
    for router in routers:
        x, output, taken = records[router.name]
        logits, indices = router.read(output)
        parameters = dict(router.module.named_parameters())
        (weight,) = (p for p in parameters.values() if p.shape == (family.experts, x.size(-1)))
        torch.testing.assert_close(logits, F.linear(x.reshape(-1, x.size(-1)), weight, parameters.get("bias")))
        assert logits.isfinite().all()
        assert logits.requires_grad
        assert indices.dtype == torch.int64
        assert indices.shape == (18, family.k)
        least = -1 if family.name == "SwitchTransformers" else 0
        assert least <= indices.min() <= indices.max() < family.experts
        torch.testing.assert_close(
            one_hot(indices, family.experts), used(family.name, family.experts, output, taken), rtol=0, atol=0
        )


@families
def test_only_routers_with_a_bias_for_choosing_have_one(family):
    for router in find_routers(family.model()):
        bias = selection_bias(router)
        assert (bias is not None) == family.bias
        assert bias is None or bias.shape == (family.experts,)


@biased
def test_the_bias_moves_the_choice_and_not_the_logits(family):
    model = family.model()
    routers = find_routers(model)
    first = routers[0]
    before, chosen = first.read(forward(model, routers)[first.name][1])
    assert not (chosen == 3).any(1).all()
    selection_bias(first)[3] += 10
    after, chosen = first.read(forward(model, routers)[first.name][1])
    assert (chosen == 3).any(1).all()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_tokens_above_the_capacity_of_a_switch_are_not_counted(capacity):
    family = Family("SwitchTransformers", {"expert_capacity": capacity}, 3, 4, 1, sizes=SWITCH)
    model = family.model()
    routers = find_routers(model)
    for name, (_, output, _) in forward(model, routers).items():
        (router,) = (r for r in routers if r.name == name)
        logits, indices = router.read(output)
        wanted = logits.view(2, 9, 4).argmax(-1)
        places = F.one_hot(wanted, 4).cumsum(1).gather(2, wanted[..., None])[..., 0]
        assert (places > capacity).any()
        assert indices.flatten().tolist() == wanted.where(places <= capacity, -1).flatten().tolist()
        kept = F.one_hot(wanted, 4).sum(1).clamp(max=capacity).sum(0)  # of each sequence
        assert expert_counts(indices, 4).tolist() == kept.tolist()


def test_a_router_of_a_model_in_a_model_may_be_derived_from_the_one_it_declares():
    class Derived(MixtralTopKRouter):
        pass

    model = FAMILIES[0].model()
    model.layers[1].mlp.gate = Derived(model.config)
    assert [r.name for r in find_routers(nn.ModuleDict({"net": model}))] == [
        f"net.layers.{i}.mlp.gate" for i in range(3)
    ]


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(8, 4)


class Chooser(Linear):
    """No name that tells what it is."""


class ForgetGate(Linear):
    """Of an attention: no router."""


class SoftmaxGate(nn.Softmax):
    """Nothing that could learn to choose."""


class TopKGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.wg = nn.Linear(8, 4)

    def forward(self, x):
        return self.wg(x)


class SigmoidRouter(TopKGate):
    def forward(self, x):
        return torch.sigmoid(self.wg(x)).logit()


class CorrectedRouter(TopKGate):
    """Its block calls the sigmoid."""

    def __init__(self):
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(4))


class CorrectedSoftmaxRouter(CorrectedRouter):
    def forward(self, x):
        return self.wg(x).softmax(-1).log()


class Mixture(nn.Module):
    def __init__(self, name, router, top_k=2):
        super().__init__()
        self.gate_proj = nn.Linear(8, 4)
        self.shared_expert_gate = nn.Linear(8, 1)
        setattr(self, name, router)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        if top_k:
            self.top_k = top_k


def hand_written(name="gate", router=Linear, top_k=2):
    blocks = [Mixture(name, router(), top_k) for _ in range(2)]
    return nn.ModuleDict({"attention": ForgetGate(), "blocks": nn.ModuleList(blocks)})


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "router", "how"),
    [
        ("router", Linear, "auto"),
        ("gate", Linear, "auto"),
        ("choose", TopKGate, "auto"),
        ("choose", Chooser, r"\d\.choose$"),
        ("choose", Chooser, lambda name, module: isinstance(module, Chooser)),
    ],
    ids=["router", "gate", "class", "expression", "function"],
)
def test_hand_written_routers(name, router, how):
    routers = find_routers(hand_written(name, router), how)
    assert [r.name for r in routers] == [f"blocks.{i}.{name}" for i in range(2)]
    for r in routers:
        logits = r.module(draw(2, 5, 8))
        read, indices = r.read(logits)
        assert read.tolist() == logits.view(10, 4).tolist()
        assert indices.tolist() == logits.view(10, 4).sort(descending=True).indices[:, :2].tolist()
        assert r.scores == "softmax"
        assert selection_bias(r) is None


@pytest.mark.parametrize(
    ("router", "scores"),
    [
        (TopKGate, "softmax"),
        (SigmoidRouter, "sigmoid"),
        (CorrectedRouter, "sigmoid"),
        (CorrectedSoftmaxRouter, "softmax"),
    ],
)
def test_scores_are_what_the_router_calls_or_else_what_its_bias_tells(router, scores):
    model = hand_written("gate", router)
    assert {r.scores for r in find_routers(model)} == {scores}
    assert {r.scores for r in find_routers(model, scores="none")} == {"none"}


def test_biases_of_the_experts_themselves_are_not_for_choosing():
    model = hand_written()
    for block in model["blocks"]:
        block.expert_bias = nn.Parameter(torch.zeros(4, 8))
    assert [selection_bias(router) for router in find_routers(model)] == [None, None]


def test_a_given_number_of_experts_of_a_token_comes_first():
    router = find_routers(hand_written(), top_k=3)[0]
    assert router.read(draw(5, 4))[1].shape == (5, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaModel(LlamaConfig(**SIZES)),
        lambda: Mixture("gate", nn.Linear(8, 1)),
        lambda: Mixture("gate", SoftmaxGate(-1)),
        lambda: nn.ModuleDict({"gate": Linear(), "attention": ForgetGate()}),
    ],
    ids=["gate_proj", "one output", "no parameters", "no experts"],
)
def test_what_is_no_router_is_not_taken_for_one(make):
    model = make()
    name = type(model).__name__
    with pytest.raises(
        ValueError, match=f"Argument `routers` must name the routers of {name}, but 'auto' finds none"
    ):
        find_routers(model)


@pytest.mark.parametrize(("how", "value"), [("gait", "'gait'"), (lambda name, module: False, "<function .*>")])
def test_a_pattern_that_finds_nothing_is_named(how, value):
    with pytest.raises(ValueError, match=f"Argument `routers` must .*, but {value} finds none"):
        find_routers(hand_written(), how)


def test_an_unknown_number_of_experts_of_a_token_is_asked_for():
    router = find_routers(hand_written(top_k=None))[1]
    with pytest.raises(ValueError, match=r"Argument `top_k` must be given: the router blocks\.1\.gate puts out no"):
        router.read(draw(5, 4))


LOGITS, WEIGHTS = draw(5, 4), draw(5, 2, seed=1)
INDICES = torch.tensor([[0, 3], [1, 2], [3, 0], [2, 1], [0, 1]])


@pytest.mark.parametrize("top_k", [2, None])
@pytest.mark.parametrize(
    "output",
    [
        (LOGITS, WEIGHTS, INDICES),
        (WEIGHTS, INDICES, LOGITS),
        [INDICES.int(), LOGITS, None],
        (LOGITS.view(1, 5, 4), INDICES.view(1, 5, 2), torch.tensor(0.1)),
    ],
)
def test_logits_and_indices_in_any_order(output, top_k):
    logits, indices = Router("gate", nn.Linear(8, 4), top_k, "softmax").read(output)
    assert logits.tolist() == LOGITS.tolist()
    assert indices.dtype == torch.int64
    assert indices.tolist() == INDICES.tolist()


@pytest.mark.parametrize("other", [torch.ones(1, 4).long(), torch.ones(4, 1).int(), LOGITS < 0, INDICES[:, 0]])
def test_counts_and_masks_are_no_indices(other):
    logits, indices = Router("gate", nn.Linear(8, 4), 2, "softmax").read((other, LOGITS))
    assert logits.tolist() == LOGITS.tolist()
    assert indices.tolist() == LOGITS.sort(descending=True).indices[:, :2].tolist()


def test_indices_of_all_experts_are_no_one_hot_rows():
    logits = draw(5, 3)
    order = logits.argsort(descending=True)
    _, indices = Router("gate", nn.Linear(8, 3), 3, "softmax", position=0).read((logits, logits.sigmoid(), order))
    assert indices.tolist() == order.tolist()


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (INDICES, "Tensor"),
        (draw(4), "Tensor"),
        ((INDICES, WEIGHTS), "tuple"),
        ((INDICES, WEIGHTS, torch.tensor(0.1)), "tuple"),
        ([], "list"),
        ({"logits": LOGITS}, "dict"),
        (None, "NoneType"),
    ],
)
def test_a_router_that_puts_out_no_logits_is_named(output, kind):
    with pytest.raises(TypeError, match=rf"The router blocks\.0\.gate must put out logits .*, but put out {kind}"):
        Router("blocks.0.gate", nn.Linear(8, 4), 2, "softmax").read(output)
