"""Supervised training on solutions, before a policy learns from rewards."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from curation.recipes.rollouts.answers import answer_log_probs
from curation.recipes.rollouts.language_models import Text

BATCH_SIZE = 64


def warm_up(
    model: Any,
    text: Text,
    solved: Callable[[int], tuple[str, str]],
    steps: int,
    lr: float,
    temperature: float,
    seed: int,
) -> float:
    """Train a model on solutions with AdamW, in batches of 64; the model is changed in place.

    Args:
        model: A causal language model of transformers, on the device that it is trained on.
        text: The tokenizer of the model.
        solved: Returns a question and its solution for any integer >= 0.
        steps: Number of optimizer steps.
        lr: Learning rate.
        temperature: Divisor of the logits.
        seed: Seed of the draws of questions; equal on all ranks.

    Returns:
        The loss per token of the last step, in nats.
    """
    model.train()
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        pairs = [solved(int(i)) for i in generator.integers(2**31, size=BATCH_SIZE)]
        questions = [text.prompt(question) for question, _ in pairs]
        answers = [text.answer(answer) for _, answer in pairs]
        log_probs, _ = answer_log_probs(model, questions, answers, temperature)
        optimizer.zero_grad()
        loss = -log_probs.mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())
