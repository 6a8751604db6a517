"""Rank correlations, smaller configurations, and shares of operations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from curation.online import rank_correlation, share_of_operations, smaller_config

scores = st.lists(st.tuples(*2 * [st.sampled_from([-1.0, 0.0, 0.5, 2.0]) | st.floats(-9, 9, width=32)]), min_size=2)


@given(scores)
def test_rank_correlation_is_spearmans(pairs):
    a, b = torch.tensor(pairs).T
    expected = spearmanr(a, b).statistic if len(set(a.tolist())) > 1 < len(set(b.tolist())) else 0.0
    assert float(rank_correlation(a, b)) == pytest.approx(expected, abs=1e-5)


def test_rows_without_a_score_do_not_count():
    a, b = torch.tensor([1.0, math.nan, 3.0, 2.0]), torch.tensor([1.0, 0.0, 2.0, math.inf])
    assert float(rank_correlation(a, b)) == 1
    assert float(rank_correlation(a[:0], b[:0])) == 0


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=99, hidden_size=96, intermediate_size=128, num_hidden_layers=4,
                    num_attention_heads=12, num_key_value_heads=4),
        LlamaConfig(vocab_size=99, hidden_size=72, intermediate_size=96, num_hidden_layers=3,
                    num_attention_heads=9, num_key_value_heads=3),  # the heads of SmolLM2
        Qwen3Config(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=4, head_dim=16,
                    num_attention_heads=8, num_key_value_heads=4),
        GPT2Config(vocab_size=99, n_embd=64, n_layer=4, n_head=8, n_positions=32),
        T5Config(vocab_size=99, d_model=64, d_ff=96, d_kv=8, num_layers=4, num_heads=8, decoder_start_token_id=0),
        BertConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8),
    ],
    ids=lambda config: f"{config.model_type}-{config.hidden_size}",
)  # fmt: skip
def test_a_smaller_model_runs_on_the_same_batches(config):
    family = {"t5": T5ForConditionalGeneration, "bert": BertForMaskedLM}.get(config.model_type)
    make = AutoModelForCausalLM.from_config if family is None else family
    before = config.to_dict()
    model, proxy = make(config), make(smaller_config(config))
    assert config.to_dict() == before
    x = torch.randint(3, 99, (2, 12))
    share = share_of_operations(proxy, model, {"input_ids": x, "labels": x})
    assert 0 < share < 0.5
    assert proxy.config.vocab_size == 99


def test_what_cannot_be_made_smaller_is_named():
    with pytest.raises(ValueError, match="must have layers and width by a known name, but Config"):
        smaller_config(type("Config", (), {})())
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=f"Argument `width` must be .* but got {share}"):
            smaller_config(GPT2Config(), width=share)


def test_operations_are_counted_by_hand():
    batch = [torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)]
    small, large = nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    assert share_of_operations(small, large, batch) == (8 * 2) / (8 * 16 + 16 * 2)
    with pytest.raises(ValueError, match="Argument `model` must have operations that torch counts, but Identity"):
        share_of_operations(small, nn.Identity(), batch)
