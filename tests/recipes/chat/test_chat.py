"""Supervised fine-tuning: what is labelled, what the loss is, and the packaged recipe end to end."""

import json
import math
import re

import pytest
import torch
from helpers import trainer
from lightning.pytorch import Callback

from curation.callbacks import DynamicDataPruning
from curation.recipes import cli
from curation.recipes.chat import Conversations, SupervisedFineTuning, conversations
from curation.recipes.chat.conversations import _alternate, encode, load
from curation.recipes.rollouts import Pretrained
from curation.recipes.smollm2 import SMOLLM2, SMOLLM2_GGUF
from curation.recipes.sources import resolve
from curation.samplers import DynamicDataPruningSampler

transformers = pytest.importorskip("transformers", reason="needs transformers, from the [recipes] extra")


class CharacterTokenizer:
    """One token per character, with the template of SmolLM2's tokenizer in one-character marks."""

    end = "|"
    chat_template = "its own"

    def __len__(self):
        return 128

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        text = "".join(f"<{m['role'][0]}>{m['content']}{self.end}\n" for m in messages)
        return text + ("<a>" if add_generation_prompt else "")

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_rows(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


def module(folder, **kwargs):
    made = SupervisedFineTuning(model=folder, gguf_file=None, **kwargs)
    made.configure_model()
    return made


def batch(labelled=(3, 1), length=7, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (len(labelled), length), generator=g)
    mask = torch.ones_like(ids)
    mask[1:, -2:] = 0
    labels = torch.full_like(ids, -100)
    for row, (n, end) in enumerate(zip(labelled, mask.sum(1), strict=True)):
        labels[row, end - n : end] = ids[row, end - n : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_the_loss_and_its_gradient_are_those_of_the_whole_model(tiny):
    trained, whole = module(tiny), module(tiny)
    loss, tokens = trained.loss(batch())
    expected = whole.model(**batch()).loss
    torch.testing.assert_close(loss, expected)
    assert tokens == 4
    loss.backward()
    expected.backward()
    for a, b in zip(trained.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_logits_are_formed_at_labelled_positions_only(tiny):
    made = module(tiny)
    seen = []
    made.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    made.loss(batch())
    assert seen == [(1, 4, 50)]


def test_validation_loss_weighs_every_answer_token_the_same(tiny):
    from lightning.pytorch import Trainer

    made, batches = module(tiny), [batch((5, 4)), batch((1, 1), seed=2)]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (result,) = trainer.validate(made, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    losses = [made.loss(b) for b in batches]
    expected = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert result["val_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_num_layers_keeps_the_first(tiny):
    full, cut = module(tiny), module(tiny, num_layers=2)
    assert cut.model.config.num_hidden_layers == len(cut.model.model.layers) == 2
    for a, b in zip(cut.model.model.layers, full.model.model.layers, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert cut.model.training
    with pytest.raises(ValueError, match=r"Argument `num_layers` must be in \[1, 3\], but got 4"):
        module(tiny, num_layers=4)


@pytest.mark.parametrize(("name", "value"), [("lr", 0.0), ("lr", math.nan), ("warmup_steps", -1)])
def test_bad_arguments_of_the_module_are_named(name, value):
    with pytest.raises(ValueError, match=f"Argument `{name}` must be .*, but got {value!r}"):
        SupervisedFineTuning(**{name: value})


@pytest.mark.parametrize("name", ["batch_size", "max_length", "context_turns", "max_samples", "val_samples"])
def test_bad_arguments_of_the_data_are_named(name):
    with pytest.raises(ValueError, match=f"Argument `{name}` must be an integer >= 1.*, but got 0"):
        Conversations(**{name: 0})
    with pytest.raises(ValueError, match=r"Argument `seed` must be an integer in \[0, 2\^63\), but got -1"):
        Conversations(seed=-1)


def test_logits_that_a_model_changes_after_its_head_are_trained_as_they_are(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "pad_token_id": 0}
    changed = (
        transformers.GraniteConfig(**sizes, logits_scaling=8.0),
        transformers.CohereConfig(**sizes, logit_scale=4.0),
        transformers.Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.5),
    )
    for config in changed:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
        made, rows = module(str(tmp_path / config.model_type)), batch()
        expected = made.model(**rows).loss
        loss, _ = made.loss(rows)
        torch.testing.assert_close(loss, expected)
        parameters = list(made.model.parameters())
        gradients = (torch.autograd.grad(value, parameters) for value in (loss, expected))
        for found, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_layers_that_are_not_there_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"Argument `num_layers` must be in \[1, 3\], but got 4"):
        Pretrained(tiny, gguf_file=None, num_layers=4).build()
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_layers` must be None for GPT2LMHeadModel, but got 1"):
        module(str(tmp_path), num_layers=1)


def test_learning_rate_rises_and_stays(tiny):
    made = module(tiny, lr=1.0, warmup_steps=4)
    scheduler = made.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_learning_rate_falls_to_nothing_at_the_end_of_the_fit(tiny):
    class Rates(Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, *_):
            self.values.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates, made = Rates(), module(tiny, lr=1.0, warmup_steps=2, schedule="linear")
    trainer(rates, max_steps=8, max_epochs=-1).fit(made, torch.utils.data.DataLoader([batch()] * 8, batch_size=None))
    assert rates.values == pytest.approx([1 - step / 8 for step in range(1, 9)])


def test_losses_of_rows_are_the_means_of_their_answers_and_reach_dynamic_pruning(tiny):
    made = module(tiny)
    loss, tokens = made.loss(batch((3, 1)))
    alone = [made.loss({k: v[i : i + 1] for k, v in batch((3, 1)).items()})[0] for i in range(2)]
    loss, _ = made.loss(batch((3, 1)))
    torch.testing.assert_close(made.sample_losses, torch.stack(alone).detach())
    assert loss.item() == pytest.approx(float((made.sample_losses * torch.tensor([3, 1])).sum() / tokens), rel=1e-5)
    rows = [{k: v[0] for k, v in batch((n,), seed=n).items()} for n in (1, 2, 3, 4)]
    sampler, pruning = DynamicDataPruningSampler(rows, 2, rule="proportional"), DynamicDataPruning()
    loader = torch.utils.data.DataLoader(rows, 2, sampler=sampler)
    trainer(pruning, max_epochs=1).fit(module(tiny, lr=1e-12), loader)
    with torch.no_grad():
        expected = [module(tiny).loss({k: v[None] for k, v in row.items()})[0].item() for row in rows]
    assert sampler.losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_labels_cover_exactly_the_last_answer_and_its_end(write_rows):
    rows = [
        {"messages": [*_alternate(["hi", "yo", "well", "fine"]), {"role": "user", "content": "unanswered"}]},
        {"messages": _alternate(["a", "b"])},
    ]
    samples = load(write_rows(rows))
    assert samples["conversation"][:] == [0, 1]
    first, second = encode(samples, CharacterTokenizer(), max_length=100)
    text = "".join(map(chr, first["input_ids"]))
    assert text == "<u>hi|\n<a>yo|\n<u>well|\n<a>fine|"
    assert first["labels"] == [-100] * (len(text) - 5) + [ord(c) for c in "fine|"]
    assert first["attention_mask"] == [1] * len(text)
    assert "".join(chr(t) for t in second["labels"] if t != -100) == "b|"
    assert len(encode(samples, CharacterTokenizer(), max_length=20)) == 1


def test_a_template_that_rewrites_the_prompt_is_refused(write_rows):
    class Rewrites(CharacterTokenizer):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
            return f"{len(messages)}"

    with pytest.raises(ValueError, match="does not repeat the prompt"):
        encode(load(write_rows([{"question": "q", "answer": "a"}])), Rewrites(), max_length=9)


@pytest.mark.parametrize("question", ["prompt", "question"])
def test_question_and_answer_become_two_messages(write_rows, question):
    (sample,) = load(write_rows([{question: "2 + 2?", "answer": "4", "extra": 1}]))
    assert sample == {
        "conversation": 0,
        "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "answer": "y"}, r"must have `messages`, .* but has \['answer', 'text'\]"),
        ({"question": "x", "answer": None}, r"must have .* but has \['question'\]"),
        ({"question": "x", "answer": " \n"}, "has no answer of the assistant's"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no answer of the assistant's"),
        ({"messages": [{"from": "human", "value": "x"}]}, "`messages` must hold `role` and `content`"),
    ],
)
def test_rows_that_cannot_be_read_are_named(write_rows, row, message):
    good = {key: [{"role": "assistant", "content": "y"}] if key == "messages" else "y" for key in row}
    if "question" in row:
        with pytest.raises(ValueError, match=f"Row 1 {message}"):
            load(write_rows([good, row]))
    else:
        with pytest.raises(ValueError, match=f"Row 0:? {message}"):
            load(write_rows([row]))


def test_rows_of_several_shapes_and_numbers_are_read(write_rows):
    rows = [{"prompt": "p", "answer": "a"}, {"question": "q", "answer": "b"}]
    assert [m[0]["content"] for m in load(write_rows(rows))["messages"]] == ["p", "q"]
    (sample,) = load(write_rows([{"question": "2 + 2?", "answer": 4}]))["messages"]
    assert sample[1]["content"] == "4"


def test_data_that_is_not_there_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "empty.jsonl").touch()
    for name in (str(tmp_path / "no.jsonl"), str(tmp_path / "empty.jsonl")):
        with pytest.raises(
            FileNotFoundError, match=r"Argument `data` must name a file with rows, but .* is missing or empty"
        ):
            load(name)
    with pytest.raises(ValueError, match=r"Argument `data` must be a .jsonl or .json file or a hub name"):
        load(str(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match="Argument `subset` must be None for 'chitchat', but got 'main'"):
        load("chitchat", "main")


def test_a_task_that_reasoning_gym_does_not_have_is_named():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, from the [demo] extra")
    with pytest.raises(ValueError, match=r"one of the families \[.*'chain_sum'.*\], but got 'nope'"):
        load("reasoning_gym:nope")


def test_reasoning_gym_gives_questions_with_verifiable_answers():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, from the [demo] extra")
    samples = load("reasoning_gym:chain_sum")
    assert len(samples) == 8192
    for messages in samples.select(range(100))["messages"]:
        question, answer = (m["content"] for m in messages)
        assert eval(question.split(":")[1].rstrip("= ")) == int(answer)


@pytest.fixture(scope="module")
def chitchat():
    pytest.importorskip("chitchat_dataset", reason="needs chitchat-dataset, from the [demo] extra")
    return load("chitchat", context_turns=3)


def test_chitchat_alternates_and_ends_with_a_real_answer(chitchat):
    for messages in chitchat.shuffle(seed=0).select(range(500))["messages"]:
        assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"][: len(messages)]
        assert len(messages) in (2, 4)
        assert len(messages[-1]["content"]) >= 2


def test_no_conversation_is_on_both_sides_and_the_split_depends_on_the_seed(chitchat, monkeypatch):
    monkeypatch.setattr(conversations, "load", lambda *_: chitchat)
    parts = train, val, test = Conversations(val_samples=100, max_samples=2000).split()
    assert [len(part) for part in parts] == [2000, 100, 100]
    for a, b in ((train, val), (train, test), (val, test)):
        assert not set(a["conversation"]) & set(b["conversation"])
    again, *_ = Conversations(val_samples=100, max_samples=2000).split()
    assert again.to_list() == train.to_list()
    reseeded, *_ = Conversations(val_samples=100, max_samples=2000, seed=1).split()
    assert reseeded["conversation"][:] != train["conversation"][:]
    fewer, *_ = Conversations(val_samples=100, max_samples=10).split()
    assert fewer.to_list() == train.select(range(10)).to_list()


def test_a_tokenizer_of_another_model_is_refused(tiny, write_rows, monkeypatch):
    from lightning.pytorch import Trainer

    monkeypatch.setattr(CharacterTokenizer, "__len__", lambda self: 51, raising=False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(
        ValueError, match="Argument `tokenizer` must belong to the model, but has 51 tokens, the model 50"
    ):
        trainer.fit(SupervisedFineTuning(tiny, gguf_file=None), made_data(write_rows, monkeypatch))


def test_the_tokenizer_is_that_of_the_model_unless_named(tiny, write_rows, monkeypatch):
    from lightning.pytorch import Trainer

    asked = []
    data = made_data(write_rows, monkeypatch, asked=asked)
    data.train, data.trainer = None, Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer.strategy.connect(SupervisedFineTuning(tiny, gguf_file=None))
    data.setup("fit")
    data.train, data.tokenizer = None, "other"
    data.setup("fit")
    assert asked[1:] == [(tiny, None), ("other", None)]


def made_data(write_rows, monkeypatch, n=40, asked=None, **kwargs):
    rows = [{"question": "q" * (i % 5 + 1), "answer": f"a{i}"} for i in range(n)]

    def from_pretrained(name, gguf_file):
        if asked is not None:
            asked.append((name, gguf_file))
        return CharacterTokenizer()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    data = Conversations(write_rows(rows), val_samples=8, batch_size=4, **kwargs)
    data.setup("fit")
    return data


def test_ids_name_the_same_sample_in_every_order(write_rows, monkeypatch):
    data = made_data(write_rows, monkeypatch)
    answers = {}
    for _ in range(2):  # two epochs, two orders
        for b in data.train_dataloader():
            assert b["sample_id"].dtype == torch.int64
            for i, row in zip(b["sample_id"].tolist(), b["labels"], strict=True):
                assert answers.setdefault(i, row[row != -100].tolist()) == row[row != -100].tolist()
    assert sorted(answers) == list(range(24))
    assert len({tuple(a) for a in answers.values()}) == 24


def test_batches_are_padded_to_their_longest_row(write_rows, monkeypatch):
    data = made_data(write_rows, monkeypatch)
    for b in (*data.val_dataloader(), *data.test_dataloader()):
        assert "sample_id" not in b
        assert b["input_ids"].shape == b["labels"].shape == b["attention_mask"].shape
        assert b["attention_mask"].sum(1).max() == b["input_ids"].size(1)
        assert torch.equal(b["attention_mask"], b["attention_mask"].sort(dim=1, descending=True).values)
        padding = b["attention_mask"] == 0
        assert (b["labels"][padding] == -100).all()


@pytest.mark.parametrize("n", [8, 16])
def test_data_with_nothing_to_train_on_is_refused(write_rows, monkeypatch, n):
    with pytest.raises(ValueError, match=r"Argument `data` must hold samples .* gave 0 of 0 training samples"):
        made_data(write_rows, monkeypatch, n=n)


def test_the_packaged_recipe_runs_on_the_real_model(gguf_read_once, tmp_path, monkeypatch):
    """SmolLM2 cut to two layers, its own tokenizer, and the data the recipe names."""
    try:
        resolve(SMOLLM2)
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("the user's own")
    options = [
        "--config=sft_utility_diversity",
        "--trainer.fast_dev_run=2",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--model.num_layers=2",
        "--data.batch_size=8",
        "--data.max_samples=64",
        "--data.val_samples=16",
    ]
    tested = cli.run(["test", *options])
    assert math.isfinite(tested.trainer.callback_metrics["test_loss"])
    made = cli.run(["fit", *options])
    (selection,) = (c for c in made.trainer.callbacks if type(c).__name__ == "UtilityDiversitySelection")
    assert (selection.samples_scored, selection.samples_trained) == (16, 4)
    assert math.isfinite(made.trainer.callback_metrics["val_loss"])
    assert not list(tmp_path.rglob("*.ckpt"))
    assert (tmp_path / "config.yaml").read_text() == "the user's own"
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve(SMOLLM2), gguf_file=SMOLLM2_GGUF)
    sample = made.datamodule.train[0]
    answer = tokenizer.decode([t for t in sample["labels"] if t != -100])
    assert re.fullmatch(r"[^<]+<\|im_end\|>", answer)
    assert tokenizer.decode(sample["input_ids"]).endswith("<|im_start|>assistant\n" + answer)


TURNS = ["hi", "hello", "who are you?", "I am a bot.", "bye", "see you"]


def test_a_conversation_is_one_sample_with_every_answer_labelled(write_rows):
    rows = load(write_rows([{"messages": _alternate(TURNS)}]))
    (row,) = encode(rows, CharacterTokenizer(), 1000, "all")
    text = "".join(map(chr, row["input_ids"]))
    assert text.endswith("<u>bye|\n<a>see you|")
    labelled = "".join(chr(t) if t != -100 else " " for t in row["labels"])
    assert labelled.split() == ["hello|", "I", "am", "a", "bot.|", "see", "you|"]
    assert row["attention_mask"] == [1] * len(text)


def test_a_conversation_is_cut_after_the_last_answer_that_fits(write_rows):
    rows = load(write_rows([{"messages": _alternate(TURNS)}]))
    whole = encode(rows, CharacterTokenizer(), 1000, "all")[0]["input_ids"]
    for fits in (len(whole), len(whole) - 1, 30, 16):
        cut = encode(rows, CharacterTokenizer(), fits, "all")
        ids = cut[0]["input_ids"]
        assert len(ids) <= fits
        assert ids == whole[: len(ids)]
        assert chr(ids[-1]) == "|"
    assert not len(encode(rows, CharacterTokenizer(), 10, "all"))


def test_a_template_that_strips_earlier_turns_is_refused_for_whole_conversations(write_rows):
    class Strips(CharacterTokenizer):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
            return super().apply_chat_template(
                messages[-2 - (not add_generation_prompt) :], tokenize, add_generation_prompt
            )

    rows = load(write_rows([{"messages": _alternate(TURNS)}]))
    with pytest.raises(ValueError, match="`replies` must be 'last' with this chat template"):
        encode(rows, Strips(), 1000, "all")


def test_every_label_of_a_conversation_has_the_probability_that_it_has_in_its_own_row(write_rows, gguf_read_once):
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve(SMOLLM2), gguf_file=SMOLLM2_GGUF)
    rows = load(write_rows([{"messages": _alternate(TURNS)[:end]} for end in (2, 4, 6)]))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve(SMOLLM2), gguf_file=SMOLLM2_GGUF, dtype=torch.float32
    ).eval()

    def log_probs(row):
        ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            predicted = model(ids[None]).logits[0, :-1].log_softmax(-1)
        scored = labels[1:] != -100
        return predicted[scored].gather(1, labels[1:][scored][:, None])[:, 0]

    apart = torch.cat([log_probs(row) for row in encode(rows, tokenizer, 512)])
    (whole,) = encode(rows.select([2]), tokenizer, 512, "all")
    torch.testing.assert_close(log_probs(whole), apart, rtol=1e-5, atol=1e-5)


def test_training_samples_are_conversations_and_validation_is_by_reply(monkeypatch):
    shown = {}
    for replies in ("last", "all"):
        data = Conversations("chitchat", replies=replies, max_samples=40, val_samples=8, max_length=256)
        monkeypatch.setattr(conversations, "load_tokenizer", lambda *_: CharacterTokenizer())
        train, val, test = data.split()
        shown[replies] = val["messages"], test["messages"]
        if replies == "all":
            assert len(set(train["conversation"])) == len(train) == 40
            assert min(len(messages) for messages in train["messages"]) >= 2
            assert max(len(messages) for messages in train["messages"]) > 4  # more than three turns of context
    assert shown["last"] == shown["all"]
