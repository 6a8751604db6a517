"""The gradient of a policy by its definition, and that of two processes against that of one."""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import trainer
from lightning.pytorch import Callback, seed_everything
from policies import Canned, Letters, assert_close, fit, policy, remembered
from processes import on_two_ranks

from curation.callbacks import DynamicDataPruning
from curation.recipes.rollouts.language_models import FromScratch
from curation.recipes.rollouts.prompts import Prompts
from curation.rollouts.advantages import advantages


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
