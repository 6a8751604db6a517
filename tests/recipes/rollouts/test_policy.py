"""Learning from rewards: fresh rollouts, any model, whole fits, and what goes wrong."""

import time
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_weights, trainer, weights
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from policies import Letters, Ratios, fit, policy, smollm2

from curation.callbacks import DifficultyAdaptiveRollouts, ExactResume
from curation.recipes.rollouts.language_models import FromScratch, Pretrained
from curation.recipes.rollouts.prompts import Prompts
from curation.recipes.rollouts.tasks import Puzzles


@pytest.mark.parametrize("callbacks", [(), (DifficultyAdaptiveRollouts(n=4, preflight=4),)])
def test_rollouts_are_always_of_the_weights_that_learn_from_them(callbacks):
    """Else the ratio of new to old probability would not be 1: each step moves the weights far."""
    ratios, module = Ratios(), policy(lr=2e-2)
    run = fit(module, *callbacks, ratios, max_epochs=4)
    assert run.global_step >= 4
    assert ratios.values == pytest.approx([1.0] * len(ratios.values), abs=1e-4)
    several_passes = Ratios()
    fit(policy(lr=2e-2, epochs=3), several_passes)
    assert max(abs(ratio - 1) for ratio in several_passes.values) > 1e-2


def test_learning_has_no_dropout_whatever_the_mode_that_a_model_comes_in():
    from transformers import GPT2Config, GPT2LMHeadModel

    class Dropout(FromScratch):
        def build(self):
            torch.manual_seed(0)
            sizes = {"vocab_size": 29, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
            config = GPT2Config(**sizes, resid_pdrop=0.5, bos_token_id=None, eos_token_id=1)
            return GPT2LMHeadModel(config).train(training), super().build()[1]

    for training, warmup in ((True, 0), (False, 0), (False, 1)):
        module, ratios = policy(warmup_steps=warmup), Ratios()
        module.source = Dropout("abcdefghijklmnopqrstuvwxyz=")
        fit(module, ratios, max_steps=2, max_epochs=-1, limit_val_batches=0)
        assert ratios.values == pytest.approx([1.0] * len(ratios.values), abs=1e-4)
        assert module.model.training == training


def test_adapters_are_learned_from_and_trained():
    peft = pytest.importorskip("peft", reason="needs peft, from the [test] extra")

    class Adapted(FromScratch):
        def __init__(self, make):
            super().__init__("abc=", hidden=16, layers=1, heads=2, context=16)
            self.make = make

        def build(self):
            model, text = super().build()
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            return self.make(model), text

    names = ["q_proj", "lm_head"]
    lora = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    for make in (lambda m: peft.inject_adapter_in_model(lora, m), lambda m: peft.get_peft_model(m, lora)):
        module, ratios = policy(lr=2e-2), Ratios()
        module.source = Adapted(make)
        run = fit(module, ratios, max_epochs=2)
        assert ratios.values == pytest.approx([1.0] * len(ratios.values), abs=1e-4)
        trained = {n for n, p in module.model.named_parameters() if p in run.optimizers[0].state}
        assert all(any(name in t for t in trained) for name in names)
        assert all("lora" in name for name in trained)
    module = policy()
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    module.source = Adapted(lambda m: peft.get_peft_model(m, virtual))
    with pytest.raises(TypeError, match="PeftModelForCausalLM has virtual tokens"):
        fit(module)


def test_a_policy_trains_its_adapters_alone_and_shares_frozen_weights_with_its_reference(tmp_path):
    pytest.importorskip("peft", reason="needs peft, from the [lora] extra")
    options = {"lora": {"rank": 2, "targets": ["q_proj"]}, "kl": 0.1, "warmup_steps": 2, "lr": 2e-2}
    source = FromScratch("abcdefghijklmnopqrstuvwxyz=", hidden=16, layers=1, heads=2, context=32)

    def made():
        module = policy(**options)
        module.source = source
        return module

    module, ratios, save = made(), Ratios(), ModelCheckpoint(tmp_path, filename="first")
    run = fit(module, ratios, save, ExactResume(), max_epochs=1, enable_checkpointing=True)
    assert ratios.values == pytest.approx([1.0] * len(ratios.values), abs=1e-4)
    adapters = {n: p for n, p in module.model.named_parameters() if ".lora_" in n}
    (group,) = run.optimizers[0].param_groups
    assert list(map(id, group["params"])) == list(map(id, adapters.values()))
    plain = dict(source.build()[0].named_parameters())
    reference = dict(module.reference.named_parameters())
    for name, parameter in module.model.named_parameters():
        assert (reference[name] is parameter) == (name not in adapters)
        if name in adapters:
            assert not torch.equal(reference[name], parameter)
            assert reference[name].any()  # from the warm-up
        else:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(plain.pop(name), parameter)
    assert not plain

    whole, resumed = made(), made()
    fit(whole, ExactResume())
    seed_everything(3, verbose=False)
    trainer(ExactResume(), max_epochs=2, num_sanity_val_steps=0).fit(
        resumed, Prompts(Letters(), batch_size=6), ckpt_path=tmp_path / "first.ckpt"
    )
    assert_same_weights(weights(whole), weights(resumed))


class Unscored(Letters):
    def score(self, i, answer):
        raise KeyError("no judge")


def test_a_task_that_can_score_no_answer_ends_the_run_by_name():
    with pytest.raises(RuntimeError, match=r"Unscored could score none of 36 answers .*: KeyError\('no judge'\)"):
        fit(policy(), data=Prompts(Unscored(), batch_size=6), limit_val_batches=0)


def test_answers_end_where_the_model_and_its_template_say(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<end>", "user", "assistant", "yes", "12321", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    for template, end in (("{{ m.role }} {{ m.content }} <end> ", 2), ("{{ m.role }} {{ m.content }} ", 1)):
        saved.chat_template = f"{{% for m in messages %}}{template}{{% endfor %}}"
        saved.save_pretrained(tmp_path)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ))  # fmt: skip
        model.generation_config = GenerationConfig(eos_token_id=[1, 2], pad_token_id=0)
        model.save_pretrained(tmp_path)
        _, text = Pretrained(str(tmp_path), gguf_file=None).build()
        assert text.stop_ids == [1, 2]
        assert text.answer("yes").tolist() == [5, end]
        assert text.decode([5, 2]) == text.decode([5, 1]) == text.decode([5]) == "yes"


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_whole_precisions(precision):
    run = fit(policy(), precision=precision, max_epochs=1)
    assert run.global_step == 2
    assert run.lightning_module.model.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]


def test_an_evaluation_before_a_fit_changes_nothing():
    results = []
    for evaluate in (False, True):
        module, data = policy(warmup_steps=2), Prompts(Letters(), batch_size=6)
        module.source.alphabet = "abcdefghijklmnopqrstuvwxyz="
        seed_everything(3, verbose=False)
        run = trainer(max_epochs=1, num_sanity_val_steps=0)
        if evaluate:
            run.validate(module, data, verbose=False)
        seed_everything(3, verbose=False)  # of the order of prompts
        run.fit(module, data)
        results.append(weights(module))
    assert_same_weights(*results)


def test_the_policy_stays_near_its_start_where_that_is_asked_for():
    logged = []
    for kl in (1e-9, 10.0):
        run = fit(policy(kl=kl, lr=3e-2), max_epochs=6)
        logged.append(float(run.callback_metrics["policy/kl"]))
    assert 0 <= logged[1] < 0.3 * logged[0]


def test_it_learns_what_is_rewarded():
    before, after = policy(), policy(lr=3e-2)
    first = fit(before, max_epochs=1).callback_metrics["val_pass_at_1"]
    last = fit(after, max_epochs=15).callback_metrics["val_pass_at_1"]
    assert float(first) < 0.8
    assert float(last) > 0.9


class Broken(Letters):
    def score(self, i, answer):
        if i % 2:
            raise KeyError("no such thing")
        return float("nan") if "b" in answer else float("a" in answer)


def test_answers_that_cannot_be_scored_are_wrong_and_counted():
    with pytest.warns(UserWarning, match="An answer could not be scored and counts as wrong"):
        run = fit(policy(), data=Prompts(Broken(), batch_size=6), max_epochs=1)
    assert float(run.callback_metrics["rollouts/not_scored"]) >= 36  # of half of 12 prompts with 6 answers


class Slow(Letters):
    def score(self, i, answer):
        time.sleep(30 if i == 0 else 0)
        return 1.0


def test_the_time_limit_of_a_reward_is_an_argument():
    with pytest.warns(UserWarning, match=r"counts as wrong: TimeoutError\('no score after 0.05 s'\)"):
        run = fit(policy(reward_seconds=0.05, rollouts=2), data=Prompts(Slow(), batch_size=12), max_epochs=1)
    assert float(run.callback_metrics["rollouts/not_scored"]) == 2  # both answers to the first prompt


def test_solutions_warm_up():
    cold, warm = policy(lr=1e-6), policy(lr=1e-6, warmup_steps=200, warmup_lr=1e-2)
    prompts = Prompts(Puzzles("sort", 20, 1, 1), batch_size=4, seen=8)
    for module in (cold, warm):
        module.source.alphabet = "abcdefghijklmnopqrstuvwxyz="
    options = {"data": prompts, "max_epochs": 1}
    first = fit(cold, **options).callback_metrics["seen_pass_at_1"]
    last = fit(warm, **options).callback_metrics["seen_pass_at_1"]
    assert float(first) < 0.2
    assert float(last) > 0.5


@smollm2
def test_a_real_model_answers_in_its_own_words(gguf_read_once):
    model, text = Pretrained(num_layers=1).build()
    assert len(model.base_model.layers) == 1
    prompt = text.prompt("What is 2 + 3?")
    assert "user" in text.decode(prompt.tolist())
    answer = text.answer("5")
    assert answer[-1].item() in text.stop_ids
    assert text.decode(answer.tolist()) == "5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rollouts": True}, "Argument `rollouts` must be an integer >= 1, but got True"),
        ({"reward_seconds": 0}, r"Argument `reward_seconds` must be in \(0, inf\), but got 0"),
        ({"baseline": "mean"}, "Argument `baseline` must be 'centred', .* but got 'mean'"),
        ({"rollouts": 0}, "Argument `rollouts` must be an integer >= 1, but got 0"),
        ({"temperature": 0.0}, r"Argument `temperature` must be in \(0, inf\), but got 0.0"),
        ({"kl": -1.0}, r"Argument `kl` must be in \[0, inf\), but got -1.0"),
        ({"lr": float("nan")}, r"Argument `lr` must be in \(0, inf\), but got nan"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        policy(**arguments)


def test_data_without_a_task_are_refused():
    with pytest.raises(TypeError, match="PolicyModule needs a data module with a `task`"):
        trainer().fit(policy(), [{"ids": torch.arange(2), "questions": ["a=", "b="]}])
    data = Prompts(Letters(), batch_size=7)
    data.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match=r"`batch_size` must be in \[1, 6\] on 2 processes, but got 7"):
        data.train_dataloader()


def test_what_cannot_be_answered_is_named_before_anything_is_trained():
    with pytest.raises(ValueError, match=r"`alphabet` must have every character of the task, but '.' is missing"):
        fit(policy(), data=Prompts(Puzzles("sort", 26, 1, 1), batch_size=6))
    with pytest.raises(ValueError, match="Argument `max_new_tokens` must be in"):
        fit(policy(max_new_tokens=20))
    for arguments, message in (
        ({"holdout": 1.0}, r"Argument `holdout` must be in \(0, 1\), but got 1.0"),
        ({"batch_size": 13}, r"Argument `batch_size` must be an integer in \[1, 13\), but got 13"),
        ({"seen": 13}, r"Argument `seen` must be an integer in \[0, 13\), but got 13"),
    ):
        with pytest.raises(ValueError, match=message):
            Prompts(Letters(), **arguments)
