"""Shared prefill and ragged decoding against the model's own ``generate`` and full forward passes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from curation import rng
from curation.log_probs import token_log_probs
from curation.rollouts import generation
from curation.rollouts.generation import Completions, from_sequences, generate, prefill

V, PAD, NEW = 40, 0, 9
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTHS = [5, 1, 9, 3, 1, 5, 12, 2]
COUNTS = torch.tensor([2, 1, 0, 3, 2, 0, 4, 1])


def llama(**changes):
    return seeded(LlamaForCausalLM, LlamaConfig(vocab_size=V, num_key_value_heads=2, **(SMALL | changes)))


def gpt2():
    return seeded(GPT2LMHeadModel, GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def bloom():
    return seeded(BloomForCausalLM, BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4))


def sliding():
    config = MistralConfig(vocab_size=V, num_key_value_heads=2, head_dim=8, sliding_window=4, **SMALL)
    return seeded(MistralForCausalLM, config)


def linear_attention():
    config = Qwen3NextConfig(
        vocab_size=V,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=0,
        **SMALL,
    )
    return seeded(Qwen3NextForCausalLM, config)


def seeded(build, config):
    with rng.isolated():
        torch.manual_seed(0)
        model = build(config).eval()
        for p in model.parameters():
            if p.dim() > 1:
                p.data.mul_(8)  # far from uniform, so that tokens depend on what came before
    return model


def prompts_of(lengths=tuple(LENGTHS)):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(1, V, (n,), generator=g) for n in lengths]


def sampled(model, cache, counts=COUNTS, seed=0, **changes):
    options = {"max_new_tokens": NEW, "stop_ids": [], "token_budget": 60, "generator": seeds(seed)} | changes
    return generate(model, cache, counts, **options)


def seeds(seed):
    return torch.Generator().manual_seed(seed)


def own_greedy(model, prompt, new=NEW, stop_ids=None):
    """The completion that the model's own `generate` gives one prompt."""
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=stop_ids,
        pad_token_id=PAD,
    )
    return out[0, len(prompt) :].tolist()


def rows(completions):
    return [t[:n] for t, n in zip(completions.tokens.tolist(), completions.lengths.tolist(), strict=True)]


def same(a, b):
    assert a.pad_id == b.pad_id
    for name in ("prompt_index", "tokens", "lengths", "log_probs", "finished"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("build", [llama, gpt2, bloom, sliding, linear_attention])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_greedy_tokens_are_those_of_the_models_own_generate(build, budget):
    model, prompts = build(), prompts_of()
    cache = prefill(model, prompts, PAD, budget)
    found = sampled(model, cache, temperature=0, token_budget=budget)
    assert found.prompt_index.tolist() == torch.arange(len(prompts)).repeat_interleave(COUNTS).tolist()
    assert rows(found) == [own_greedy(model, prompts[i]) for i in found.prompt_index]
    assert found.lengths.eq(NEW).all()
    assert not found.finished.any()


class Passes:
    """Shapes of what is run through the model while this is open."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.shapes = []
        embedding = self.model.get_input_embeddings()
        self.hook = embedding.register_forward_pre_hook(lambda _, ids: self.shapes.append(tuple(ids[0].shape)))
        return self

    def __exit__(self, *_):
        self.hook.remove()

    @property
    def tokens(self):
        return sum(b * n for b, n in self.shapes)


@pytest.mark.parametrize("between", [1, 3, 100])
@pytest.mark.parametrize("stop_ids", [[12], list(range(3, 12))])
@pytest.mark.parametrize("build", [llama, linear_attention])
def test_stop_tokens_end_a_row_and_dropping_finished_rows_changes_nothing(build, stop_ids, between, monkeypatch):
    monkeypatch.setattr(generation, "_tokens_between_checks", lambda device: between)
    model, prompts = build(), prompts_of()
    cache = prefill(model, prompts, PAD, 1000)
    found = sampled(model, cache, temperature=0, stop_ids=stop_ids, max_new_tokens=20, token_budget=1000)
    assert rows(found) == [own_greedy(model, prompts[i], 20, stop_ids) for i in found.prompt_index]
    last = found.tokens.gather(1, found.lengths[:, None] - 1)[:, 0]
    assert found.finished.tolist() == [token in stop_ids for token in last.tolist()]
    assert found.finished.any()
    assert found.tokens.size(1) == found.lengths.max()
    after = torch.arange(found.tokens.size(1)) >= found.lengths[:, None]
    assert found.tokens[after].eq(PAD).all()
    assert found.log_probs[after].eq(0).all()
    assert (found.log_probs[~after] < 0).all()


@pytest.mark.parametrize("between", [1, 3])
def test_finished_rows_are_dropped_when_they_are_an_eighth_of_their_batch(between, monkeypatch):
    monkeypatch.setattr(generation, "_tokens_between_checks", lambda device: between)
    model = llama()
    cache = prefill(model, prompts_of([6] * 12), PAD, 1000)
    with Passes(model) as passes:
        found = sampled(
            model, cache, np.ones(12, np.int64), stop_ids=[3, 8, 12], max_new_tokens=30, token_budget=1000
        )
    live, wanted = found.lengths.tolist(), []
    for step in range(30):
        running = [n for n in live if n > step]
        if step % between == 0 and 8 * len(running) <= 7 * len(live):
            live = running
        wanted += [(len(live), 1)] * (len(live) > 0)
    assert passes.shapes == wanted
    assert len(set(wanted)) > 2


def test_keys_are_written_into_room_made_in_advance():
    model, places = llama(), []

    def note(_, args, kwargs):
        places.append([layer.keys.data_ptr() for layer in kwargs["past_key_values"].layers])

    cache = prefill(model, prompts_of([6, 4]), PAD, 99)
    model.register_forward_pre_hook(note, with_kwargs=True)
    sampled(model, cache, [2, 1])
    assert len(places) == NEW
    assert all(place == places[1] for place in places[1:])  # the first is of the prompts alone


@pytest.mark.parametrize("build", [llama, gpt2, bloom, sliding, linear_attention])
def test_no_logits_of_prompt_positions_are_formed(build):
    model, formed = build(), []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, logits: formed.append(logits.shape[:2].numel())
    )
    cache = prefill(model, prompts_of([6, 4, 4]), PAD, 99)
    assert formed == [0]
    sampled(model, cache, [2, 1, 1])
    assert formed[1:] == [3] + [4] * (NEW - 1)  # the last token of each prompt once, then one of each answer


class Made(TorchDispatchMode):
    """The keys and values that are made while this is open, without views: ``[rows, heads, tokens, width]``."""

    def __init__(self, cache):
        super().__init__()
        self.seen = {t.untyped_storage().data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)}
        self.tensors = []  # held, so that no memory is used twice

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        made = f(*args, **(kwargs or {}))
        if made.dim() == 4 and made.untyped_storage().data_ptr() not in self.seen:
            self.seen.add(made.untyped_storage().data_ptr())
            self.tensors.append(made)
        return made


def test_keys_of_prompts_are_copied_once_an_answer():
    model = llama()
    batch = prefill(model, prompts_of([6, 4]), PAD, 99).batches[0]
    with Made(batch.cache) as made:
        same_rows = generation._of_rows(batch.cache, torch.tensor([0, 1]), 2)
        assert made.tensors == []
        generation._repeated(same_rows, torch.tensor([0, 0, 1, 1, 1]), 7)
    assert [t.shape for t in made.tensors if len(t) == 5] == [(5, 2, 5 + 7, 8)] * 4  # of two layers
    assert torch.equal(same_rows.layers[1].keys[4], batch.cache.layers[1].keys[1])
    assert generation._of_rows(batch.cache, torch.tensor([1]), 2).layers[0].keys.shape[0] == 1
    assert batch.cache.layers[0].keys.shape == (2, 2, 5, 8)


def test_no_mask_is_looked_at_where_nothing_is_padded():
    model, masks = llama(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    sampled(model, prefill(model, prompts_of([6, 6, 1]), PAD, 99), [2, 1, 1])
    assert len(masks) == 1 + 2 * NEW
    assert all(mask is None for mask in masks)


def test_decoding_ends_when_all_rows_have():
    model = llama()
    with Passes(model) as passes:
        found = sampled(model, prefill(model, prompts_of([4]), PAD, 99), [3], stop_ids=range(V))
    assert found.lengths.tolist() == [1, 1, 1]
    assert passes.shapes == [(1, 3), (1, 1)]  # the prompt's last token once for all three


@pytest.mark.parametrize("build", [llama, gpt2])
def test_two_stages_are_one_with_more_and_prefill_nothing_again(build):
    model, prompts = build(), prompts_of()
    extra = torch.tensor([0, 3, 1, 0, 2, 0, 1, 0])
    with Passes(model) as first:
        cache = prefill(model, prompts, PAD, 60)
    padding = sum(b.mask.eq(0).sum() for b in cache.batches)
    assert cache.prefilled_tokens == sum(LENGTHS) - len(LENGTHS) == first.tokens - padding
    with Passes(model) as later:
        options = {"temperature": 0, "token_budget": 1000}
        stages = [sampled(model, cache, counts, **options) for counts in (COUNTS, extra)]
    assert {n for _, n in later.shapes} == {1}
    prompts_answered = int((COUNTS > 0).sum() + (extra > 0).sum())
    assert later.tokens == prompts_answered + int((COUNTS + extra).sum()) * (NEW - 1)
    same(Completions.cat(stages), sampled(model, cache, COUNTS + extra, **options))


def test_pooled_stages_are_padded_and_keep_their_order():
    def stage(prompts, tokens, log_probs=None):
        tokens = torch.tensor(tokens)
        lengths = tokens.ne(PAD).sum(1)
        known = None if log_probs is None else tokens * log_probs
        return Completions(torch.tensor(prompts), tokens, lengths, known, tokens[:, 0].eq(7), PAD)

    first, second = stage([0, 2, 2], [[1], [2], [7]], 0.5), stage([0, 1, 2], [[4, 4, 4], [5, 5, 0], [7, 6, 0]], 0.5)
    pooled = Completions.cat([first, second])
    tokens = [[1, 0, 0], [4, 4, 4], [5, 5, 0], [2, 0, 0], [7, 0, 0], [7, 6, 0]]
    same(pooled, stage([0, 0, 1, 2, 2, 2], tokens, 0.5))
    assert Completions.cat([first, stage([1], [[3]])]).log_probs is None


@pytest.mark.parametrize("build", [llama, sliding, linear_attention])
def test_the_cache_is_left_as_it_was(build):
    def tensors(cache):
        states = [
            list(vars(layer).values()) for b in cache.batches if b.cache is not None for layer in b.cache.layers
        ]
        return [t for t in tree_leaves(states) if isinstance(t, torch.Tensor)]

    model = build()
    cache = prefill(model, prompts_of(), PAD, 60)
    before = [t.clone() for t in tensors(cache)]
    sampled(model, cache, stop_ids=[7, 8, 9])
    assert len(before) >= 8
    for now, then in zip(tensors(cache), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_log_probs_are_those_of_a_full_forward_pass(build, temperature):
    model, prompts = build(), prompts_of()
    stop_ids = [7, 8, 9]
    found = sampled(model, prefill(model, prompts, PAD, 60), temperature=temperature, stop_ids=stop_ids)
    for i, (row, completion) in enumerate(zip(found.prompt_index.tolist(), rows(found), strict=True)):
        ids = torch.cat([prompts[row], torch.tensor(completion)])
        with torch.no_grad():
            hidden = model.base_model(ids[None]).last_hidden_state[0, len(prompts[row]) - 1 : -1]
        head = model.get_output_embeddings().weight
        wanted = token_log_probs(hidden, head, torch.tensor(completion), temperature=temperature or 1.0)
        torch.testing.assert_close(found.log_probs[i, : len(completion)], wanted.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(temperature):
    model = llama()
    prompt = prompts_of([6])[0]
    found = sampled(
        model,
        prefill(model, [prompt], PAD, 99),
        [20_000],
        max_new_tokens=2,
        temperature=temperature,
        token_budget=10**6,
    )

    def statistic(given, tokens, t):
        with torch.no_grad():
            logits = model(torch.cat([prompt, torch.tensor(given, dtype=torch.int64)])[None]).logits[0, -1]
        expected = (logits / t).softmax(0).double() * len(tokens)
        often = expected > 5
        seen = torch.bincount(tokens, minlength=V)
        return (float(((seen - expected) ** 2 / expected)[often].sum()) - often.sum()) / (2 * often.sum()) ** 0.5

    first, second = found.tokens.T
    commonest = first.mode().values
    for given, tokens in (([], first), ([commonest], second[first == commonest])):
        assert abs(statistic(given, tokens, temperature)) < 3.5
        assert statistic(given, tokens, 1.5 * temperature) > 20


def test_the_same_seed_gives_the_same_completions_and_a_stream_goes_on():
    model = llama()
    cache = prefill(model, prompts_of(), PAD, 60)
    one, two, other = sampled(model, cache, seed=3), sampled(model, cache, seed=3), sampled(model, cache, seed=4)
    same(one, two)
    assert not torch.equal(one.tokens, other.tokens)
    generator = seeds(3)
    streamed = [sampled(model, cache, generator=generator) for _ in range(2)]
    same(streamed[0], one)
    assert not torch.equal(streamed[1].tokens, one.tokens)
    row = one.tokens[one.prompt_index == 6]
    assert not torch.equal(row[0], row[1])


def test_modes_random_streams_and_gradients_are_left_alone():
    model, prompts = gpt2(), prompts_of()
    wanted = sampled(model, prefill(model, prompts, PAD, 60), temperature=0)
    model.train()
    model.transformer.h[1].eval()
    flags, state = [m.training for m in model.modules()], rng.capture()
    cache = prefill(model, prompts, PAD, 60)
    same(sampled(model, cache, temperature=0), wanted)  # no dropout
    assert not sampled(model, cache).log_probs.requires_grad
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(rng.capture()["torch"], state["torch"])
    assert torch.is_grad_enabled()


def test_batches_stay_within_the_token_budget():
    model, budget = llama(), 60
    with Passes(model) as passes:
        cache = prefill(model, prompts_of(), PAD, budget)
    assert all(b * n <= budget for b, n in passes.shapes)
    assert len(passes.shapes) == 2  # 1, 2, 4, 4, 8 and 11 tokens do not fit together
    assert sorted(torch.cat([b.prompt_index for b in cache.batches]).tolist()) == list(range(len(LENGTHS)))
    for batch in cache.batches:
        assert len(set(cache.lengths[batch.prompt_index].eq(1).tolist())) == 1
        with Passes(model) as passes:
            chosen = torch.zeros_like(COUNTS).index_fill(0, batch.prompt_index, 1) * COUNTS
            sampled(model, cache, chosen, token_budget=budget)
        width = batch.mask.size(1) + 1 + NEW
        most = max(1, budget // width)
        parts = batch.prompt_index.repeat_interleave(chosen[batch.prompt_index]).split(most)
        parts = [part.tolist() for part in parts if len(part)]
        assert passes.shapes == [
            (len(run), 1) for part in parts for run in [set(part), *[part] * (NEW - 1)]
        ]  # the last token of a prompt once
    with Passes(model) as passes:
        sampled(model, prefill(model, prompts_of(), PAD, 1), token_budget=1)
    assert {b for b, _ in passes.shapes[2:]} == {1}


def test_rows_expected_to_end_together_are_decoded_together():
    model = llama()
    cache = prefill(model, prompts_of([6] * 8), PAD, 1000)
    options = {"temperature": 0, "stop_ids": [3, 7, 8, 9, 20], "max_new_tokens": 20, "token_budget": 2 * 26}
    plain = sampled(model, cache, np.ones(8, np.int64), **options)
    steps = {}
    for name, expected in (("known", plain.lengths), ("wrong", torch.arange(8)), ("none", None)):
        with Passes(model) as passes:
            same(sampled(model, cache, np.ones(8, np.int64), expected_lengths=expected, **options), plain)
        steps[name] = len(passes.shapes)
    longest = plain.lengths.sort().values[1::2]
    assert steps["known"] == longest.sum() < min(steps["none"], steps["wrong"])


@pytest.mark.parametrize("lengths", [[], [3, 1]])
def test_no_completions_at_all(lengths):
    model = llama()
    found = sampled(model, prefill(model, prompts_of(lengths), PAD, 99), torch.zeros(len(lengths), dtype=torch.int64))
    assert found.tokens.shape == found.log_probs.shape == (0, 0)
    assert [t.dtype for t in (found.prompt_index, found.lengths)] == 2 * [torch.int64]
    assert found.finished.dtype == torch.bool


def test_half_precision_and_autocast():
    model, prompts = llama(), prompts_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = sampled(model, prefill(model, prompts, PAD, 60), temperature=0)
    model.bfloat16()
    half = sampled(model, prefill(model, prompts, PAD, 60))
    assert half.log_probs.dtype == mixed.log_probs.dtype == torch.float32
    for found in (half, mixed):
        assert (found.log_probs < 0).all()
        assert found.log_probs.isfinite().all()
    i = found.prompt_index.tolist().index(6)
    ids = torch.cat([prompts[6], half.tokens[i]])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(prompts[6]) - 1 : -1].float()
    wanted = logits.log_softmax(-1).gather(1, half.tokens[i][:, None])[:, 0]
    torch.testing.assert_close(half.log_probs[i], wanted, rtol=0.05, atol=0.3)


def test_completions_out_of_a_modules_own_sequences():
    sequences = torch.tensor([[9, 9, 4, 5, 6], [9, 9, 4, 7, 0], [9, 9, 7, 7, 4], [9, 9, 0, 4, 0], [9, 9, 4, 0, 0]])
    found = from_sequences(torch.tensor([2, 1, 1, 0, 0]), sequences, 2, [7], PAD)
    assert found.prompt_index.tolist() == [0, 0, 1, 1, 2]
    assert found.tokens.tolist() == [[0, 4, 0], [4, 0, 0], [4, 7, 0], [7, 0, 0], [4, 5, 6]]
    assert found.lengths.tolist() == [2, 1, 2, 1, 3]
    assert found.finished.tolist() == [False, False, True, True, False]
    assert found.log_probs is None
    with_stop = from_sequences(torch.arange(5), sequences, 2, [PAD, 7], PAD)
    assert with_stop.lengths.tolist() == [3, 2, 1, 1, 2]
    assert with_stop.finished.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("stop_ids", [[7, 8], [PAD]])
def test_sequences_of_generate_are_the_completions_of_shared_prefill(stop_ids):
    model, prompts = llama(), prompts_of([4, 4, 4, 4])
    out = model.generate(
        torch.stack(prompts), do_sample=False, max_new_tokens=12, eos_token_id=stop_ids, pad_token_id=PAD
    )
    theirs = from_sequences(torch.arange(4), out, 4, stop_ids, PAD)
    cache = prefill(model, prompts, PAD, 99)
    ours = sampled(
        model, cache, torch.ones(4, dtype=torch.int64), temperature=0, stop_ids=stop_ids, max_new_tokens=12
    )
    assert rows(ours) == rows(theirs)
    assert torch.equal(ours.finished, theirs.finished)


class WithoutCache(nn.Module):
    config = SimpleNamespace(get_text_config=lambda decoder: None)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, V)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids, **_):
        return SimpleNamespace(logits=self.embedding(ids))


@pytest.mark.parametrize("length", [1, 4])
def test_a_model_without_a_cache_is_refused(length):
    with pytest.raises(TypeError, match="WithoutCache keeps no keys and values; see `from_sequences`"):
        sampled(WithoutCache(), prefill(WithoutCache(), prompts_of([length]), PAD, 99), [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_id": None}, r"`pad_id` must be an integer in \[0, 40\), but got None"),
        ({"pad_id": 40}, r"`pad_id` must be an integer in \[0, 40\), but got 40"),
        ({"pad_id": -1}, r"`pad_id` must be an integer in \[0, 40\), but got -1"),
        ({"prompts": prompts_of([3, 0])}, r"1 to 16 tokens, but prompt 1 is torch.int64 \[0\]"),
        ({"prompts": prompts_of([17])}, r"1 to 16 tokens, but prompt 0 is torch.int64 \[17\]"),
        ({"prompts": [torch.zeros(1, 2, dtype=torch.int64)]}, r"must be int64 \[n\] each, .* torch.int64 \[1, 2\]"),
        ({"prompts": [torch.zeros(2)]}, r"must be int64 \[n\] each, .* but prompt 0 is torch.float32 \[2\]"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(change, message):
    arguments = {"prompts": prompts_of([3]), "pad_id": PAD, "token_budget": 9} | change
    with pytest.raises(ValueError, match=message):
        prefill(llama(max_position_embeddings=16), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [1]}, r"`counts` must be 2 integers >= 0, but got \[1\]"),
        ({"counts": np.array([1, -1])}, r"`counts` must be 2 integers >= 0, but got \[1, -1\]"),
        ({"counts": torch.ones(2)}, r"`counts` must be 2 integers >= 0, but got \[1.0, 1.0\]"),
        ({"max_new_tokens": 12}, r"`max_new_tokens` must be in \[1, 11\], .* but got 12"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer >= 1, but got 0"),
        ({"temperature": -0.5}, r"`temperature` must be in \[0, inf\), but got -0.5"),
        ({"temperature": float("nan")}, r"`temperature` must be in \[0, inf\), but got nan"),
        ({"expected_lengths": torch.ones(3)}, r"`expected_lengths` must be \[2\], but got \[3\]"),
        ({"generator": torch.default_generator}, "`generator` must not be a global one"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    model = llama(max_position_embeddings=16)
    cache = prefill(model, prompts_of([5, 2]), PAD, 99)
    with pytest.raises(ValueError, match=message):
        sampled(model, cache, **({"counts": [1, 1]} | change))


def test_the_whole_context_may_be_used():
    model = llama(max_position_embeddings=16)
    assert sampled(model, prefill(model, prompts_of([5, 2]), PAD, 99), [1, 1], max_new_tokens=11).lengths.sum() == 22


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", [llama, gpt2])
def test_on_a_gpu(build):
    model, prompts = build(), prompts_of()
    wanted = sampled(model, prefill(model, prompts, PAD, 60), temperature=0, stop_ids=[7, 8])
    model.cuda()
    cache = prefill(model, prompts, PAD, 60)
    found = sampled(model, cache, temperature=0, stop_ids=[7, 8])
    assert rows(found) == rows(wanted)
    assert found.tokens.is_cuda
    same(sampled(model, cache, seed=3), sampled(model, cache, seed=3))  # of a generator on the CPU
    on_device = [sampled(model, cache, generator=torch.Generator("cuda").manual_seed(3)) for _ in range(2)]
    same(*on_device)
    half = sampled(model.bfloat16(), prefill(model, prompts, PAD, 60))
    assert half.log_probs.isfinite().all()


def test_tokens_are_drawn_as_often_as_they_are_probable():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = generation._drawn(p.expand(20000, 6), seeds(0))[:, 0]
    shares = torch.bincount(drawn, minlength=6) / 20000
    assert ((shares - p).abs() <= 4 * (p * (1 - p) / 20000).sqrt()).all()  # those of probability 0 never
    last = torch.zeros(3, 6)
    last[:, 5] = 1e-30  # whatever the sum of the row
    assert generation._drawn(last, seeds(0))[:, 0].tolist() == [5, 5, 5]
