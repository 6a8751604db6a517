"""The scoring pass: routes, and no side effects."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, Classifier, assert_same_weights, weights
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from curation import rng
from curation.scoring import (
    find_output_head,
    find_route,
    head_as_identity,
    per_sample_from_hidden,
    per_sample_grad_norm,
    per_sample_loss,
    side_effect_free,
)

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = nn.ModuleDict({"model": model})


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL))


def text_batch(B=3, T=9, vocabulary=50):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (B, T), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask.eq(0), -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_scoring_changes_neither_buffers_nor_random_streams_nor_modes():
    module = Classifier()
    module.train()
    module.net[1].eval()  # frozen on purpose
    before, state = weights(module), rng.capture()
    with side_effect_free(module):
        out = module(torch.randn(8, FEATURES))
        assert not module.net[3].training
    assert not out.requires_grad
    assert torch.equal(rng.capture()["torch"], state["torch"])
    assert_same_weights(weights(module), before)
    assert [m.training for m in module.net] == [True, False, True, True, True]
    assert module.training


def test_modes_are_restored_after_an_exception():
    module = Classifier().train()
    with pytest.raises(KeyError), side_effect_free(module):
        raise KeyError
    assert all(m.training for m in module.modules())


@pytest.mark.parametrize(
    "build", [llama, lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))]
)
def test_causal_models_score_the_token_that_is_predicted(build):
    model = build().eval()
    batch = text_batch()
    logits, targets = find_route(Holder(model), batch)(batch)
    assert targets.shape == (3, 8)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, model(**batch).loss)


def test_text_without_labels_scores_every_token_that_is_attended():
    batch = text_batch()
    del batch["labels"]
    _, targets = find_route(Holder(llama()), batch)(batch)
    assert targets.ne(-100).sum(1).tolist() == [8, 5, 8]


def test_encoder_decoders_and_classifiers_are_not_shifted():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    batch = text_batch()
    logits, targets = find_route(Holder(t5.eval()), batch)(batch)
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), t5(**batch).loss)
    bert = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **SMALL))
    batch = {**text_batch(), "labels": torch.tensor([0, 2, 1])}
    logits, targets = find_route(Holder(bert), batch)(batch)
    assert logits.shape == (3, 3)
    with pytest.raises(TypeError, match="no `labels`"):
        find_route(Holder(bert), batch)({k: v for k, v in batch.items() if k != "labels"})


def test_a_head_as_identity_gives_its_input_in_the_place_of_the_logits():
    model = llama().eval()
    batch = text_batch()
    route = find_route(Holder(model), batch)
    head = find_output_head(Holder(model), "auto", batch)
    assert head is model.lm_head
    logits, targets = route(batch)
    with head_as_identity(head):
        hidden, same = route(batch)
    assert hidden.shape == (3, 8, 16)
    assert torch.equal(targets, same)
    torch.testing.assert_close(head(hidden), logits)
    torch.testing.assert_close(
        per_sample_from_hidden(per_sample_loss, hidden, targets, head),
        per_sample_loss(logits, targets),
        rtol=1e-4,
        atol=1e-5,
    )
    assert "forward" not in vars(head)


def test_a_forward_that_was_already_replaced_comes_back():
    head = nn.Linear(3, 5)
    mine = head.forward = lambda x: x * 2
    with head_as_identity(head):
        assert torch.equal(head(torch.ones(1)), torch.ones(1))
    assert head.forward is mine
    with pytest.raises(KeyError), head_as_identity(head):
        raise KeyError
    assert head.forward is mine


def test_per_sample_loss_equals_one_sample_at_a_time():
    logits, targets = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    targets[1, 2:] = -100
    targets[3] = -100
    got = per_sample_loss(logits, targets)
    for i in range(3):
        torch.testing.assert_close(got[i], F.cross_entropy(logits[i], targets[i]))
    assert got[3].isnan()
    flat = per_sample_loss(logits[:, 0], targets[:, 0].clamp(min=0))
    torch.testing.assert_close(flat, F.cross_entropy(logits[:, 0], targets[:, 0].clamp(min=0), reduction="none"))


def test_the_loss_of_samples_without_scored_positions_is_nan_on_both_routes():
    head = nn.Linear(5, 9)
    hidden, targets = torch.randn(3, 4, 5), torch.randint(0, 9, (3, 4))
    targets[1] = -100
    targets[2, :2] = -100
    expected = per_sample_loss(head(hidden), targets)
    assert expected.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(
        per_sample_from_hidden(per_sample_loss, hidden, targets, head), expected, equal_nan=True
    )
    flat = per_sample_from_hidden(per_sample_loss, hidden[:, 0], targets[:, 0].clamp(min=0), head)
    torch.testing.assert_close(flat, per_sample_loss(head(hidden[:, 0]), targets[:, 0].clamp(min=0)))


def test_score_step_goes_first_and_is_checked():
    class Own(Classifier):
        answer = (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32))

        def score_step(self, batch):
            return self.answer

    route = find_route(Own(), object())
    assert route.name == "score_step"
    logits, targets = route(None)
    assert logits is Own.answer[0]
    assert targets.dtype == torch.int64
    for answer, message in (
        ((torch.zeros(2, 3), torch.zeros(4).long()), r"torch\.float32 \[2, 3\] with torch\.int64 \[4\]"),
        ((torch.zeros(2, 1), torch.zeros(2)), r"with torch\.float32 \[2\]\. A method `score_step`"),
        (torch.zeros(2, 3), r"must be \(logits, targets\).* the losses of the rows.* got torch\.float32 \[2, 3\]"),
        (torch.zeros(2).long(), r"must be \(logits, targets\).* losses of the rows.* got torch\.int64 \[2\]"),
        ((torch.zeros(2, 3), [0, 1]), r"must be \(logits, targets\).* got \(Tensor, list\)"),
    ):
        Own.answer = answer
        with pytest.raises(TypeError, match=message):
            route(None)


def test_a_score_step_may_return_the_losses_of_any_task():
    losses = torch.tensor([3.0, 1.0]).bfloat16()

    class Own(Classifier):
        def score_step(self, batch):
            return losses

    outputs = find_route(Own(), object())(None)
    assert outputs == (losses, None)
    assert per_sample_loss(*outputs).dtype == torch.float32
    assert per_sample_loss(*outputs).tolist() == [3.0, 1.0]


def test_a_score_step_that_takes_things_out_of_its_batch_leaves_the_batch_alone():
    class Pops(Classifier):
        def score_step(self, batch):
            y = batch.pop("y")
            return self(batch["x"]), y

    batch = {"x": torch.zeros(2, FEATURES), "y": torch.tensor([0, 1])}
    find_route(Pops().eval(), batch)(batch)
    assert set(batch) == {"x", "y"}


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(2, FEATURES), torch.zeros(2)),
        {"x": torch.zeros(2, FEATURES)},
        torch.zeros(2, FEATURES),
        [torch.zeros(2, FEATURES)] * 3,
    ],
)
def test_where_nothing_fits_the_error_names_the_method_to_add(batch):
    with pytest.raises(TypeError, match=r"(?s)`Classifier`.*Add this method.*def score_step\(self, batch\)"):
        find_route(Classifier(), batch)(batch)


def test_a_module_without_forward_is_told_what_to_add():
    module = nn.Module()
    batch = (torch.zeros(2, FEATURES), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match=r"(?s)Add this method.*def score_step"):
        find_route(module, batch)(batch)


def test_two_models_and_packed_rows_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.reference = llama(), llama()

    with pytest.raises(TypeError, match=r"several Hugging Face models \(policy, reference\)"):
        find_route(Two(), text_batch())
    assert find_output_head(Two(), "auto", text_batch()) is None  # a `score_step` is enough then
    packed = {**text_batch(), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 3)}
    with pytest.raises(ValueError, match="packs several sequences into one row \\(`position_ids`\\)"):
        find_route(Holder(llama()), packed)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        find_route(Holder(llama()), {**text_batch(), "cu_seq_lens_q": torch.zeros(3)})
    padded = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0, 0]] * 3)
    batch = {**text_batch(), "position_ids": padded, "attention_mask": padded.cumsum(1).gt(0) * padded.ge(1)}
    find_route(Holder(llama()), batch)


def test_the_head_is_named_or_refused():
    module = Holder(llama())
    assert find_output_head(module, "none", text_batch()) is None
    assert find_output_head(module, "inner.model.lm_head", None) is module.inner["model"].lm_head
    with pytest.raises(ValueError, match=r"`head` must be 'auto', 'none' or the path .* but got 'lm_haed'"):
        find_output_head(module, "lm_haed", None)
    with pytest.raises(ValueError, match=r"must name a torch\.nn\.Linear, but 'inner' is a ModuleDict"):
        find_output_head(module, "inner", None)
    assert find_output_head(Classifier(), "auto", text_batch()) is None
    small = LlamaForCausalLM(LlamaConfig(vocab_size=10, num_key_value_heads=2, **SMALL))
    assert find_output_head(Holder(small), "auto", text_batch()) is None


@pytest.mark.parametrize("shape", [(5, 7), (5, 6, 7)])
def test_grad_norm_equals_what_autograd_gives(shape):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=g).requires_grad_()
    targets = torch.randint(0, 7, shape[:-1], generator=g)
    if len(shape) == 3:
        targets[:, :2] = -100
        targets[4] = -100
    got = per_sample_grad_norm(logits, targets)
    for i, (x, t) in enumerate(zip(logits, targets, strict=True)):
        if not t.ne(-100).any():
            assert got[i].isnan()
            continue
        (gradient,) = torch.autograd.grad(F.cross_entropy(x, t, ignore_index=-100), x)
        torch.testing.assert_close(got[i], gradient.norm())
