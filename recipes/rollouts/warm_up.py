"""Supervised training on solutions, before a policy learns from rewards."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from curation.recipes.causal_lm import OwnLogits
from curation.recipes.rollouts.answers import answer_log_probs
from curation.recipes.rollouts.language_models import Text

BATCH_SIZE = 64


def warm_up(
    logits: OwnLogits,
    text: Text,
    solved: Callable[[int], tuple[str, str]],
    steps: int,
    lr: float,
    temperature: float,
    seed: int,
) -> float:
    """Train a model on solutions with AdamW, in batches of 64 and in training mode.

    The weights are changed in place; afterwards every module is in the mode that it was in.

    Args:
        logits: The logits of the model, which is on the device that it is trained on.
        text: The tokenizer of the model.
        solved: Returns a question and its solution for any integer >= 0.
        steps: Number of optimizer steps.
        lr: Learning rate.
        temperature: Divisor of the logits.
        seed: Seed of the draws of questions; equal on all ranks.

    Returns:
        The loss per token of the last step, in nats.
    """
    model: nn.Module = logits.model
    evaluating = [m for m in model.modules() if not m.training]
    model.train()
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        pairs = [solved(int(i)) for i in generator.integers(2**31, size=BATCH_SIZE)]
        questions = [text.prompt(question) for question, _ in pairs]
        answers = [text.answer(answer) for _, answer in pairs]
        log_probs, _ = answer_log_probs(logits, questions, answers, temperature)
        optimizer.zero_grad()
        loss = -log_probs.mean()
        loss.backward()
        optimizer.step()
    for m in evaluating:
        m.training = False
    return float(loss.detach())
