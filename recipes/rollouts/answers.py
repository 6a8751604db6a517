"""Answers of a policy: what they are made of, in batches of tokens, and how probable a model finds them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from curation.log_probs import token_log_probs
from curation.rollouts.generation import Completions


@dataclass
class Rollouts:
    """Answers of a policy, in the order of their prompts.

    Attributes:
        completions: The tokens, on the device.
        rewards: fp32 ``[R]``, on the CPU.
        texts: The answers.
    """

    completions: Completions
    rewards: Tensor
    texts: list[str]

    @property
    def prompts(self) -> Tensor:
        """int64 ``[R]``, rising: which prompt of the batch each is of; on the CPU."""
        return self.completions.prompts.cpu()

    def pool(self, other: "Rollouts") -> "Rollouts":
        """These and others of the same batch."""
        order = torch.cat([self.prompts, other.prompts]).argsort(stable=True)
        texts = [*self.texts, *other.texts]
        rewards = torch.cat([self.rewards, other.rewards])[order]
        return Rollouts(
            Completions.cat([self.completions, other.completions]), rewards, [texts[i] for i in order.tolist()]
        )

    def cpu(self) -> "Rollouts":
        """The same on the CPU, in one copy and not one a row."""
        here = {f.name: getattr(self.completions, f.name) for f in fields(Completions)}
        here = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in here.items()}
        return Rollouts(Completions(**here), self.rewards, self.texts)


def packed(rows: Tensor, width: Tensor, budget: int) -> Iterator[Tensor]:
    """Rows in batches of at most ``budget`` tokens, padding included, long ones first; one at least.

    Args:
        rows: int64 ``[R]``.
        width: int64 ``[R]``, tokens of each.
        budget: Tokens.

    Example:
        >>> [part.tolist() for part in packed(torch.arange(4), torch.tensor([2, 5, 4, 1]), 10)]
        [[1, 2], [0, 3]]
    """
    order = width.argsort(descending=True, stable=True)
    start = 0
    while start < len(rows):
        size = max(1, budget // int(width[order[start]]))
        yield rows[order[start : start + size]]
        start += size


def answer_log_probs(
    model: Any, questions: Iterable[Tensor], answers: Iterable[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """Of the tokens of answers, one after the other: fp32 ``[N]``, and whose each is, int64 ``[N]``.

    Args:
        model: A causal language model of transformers.
        questions: int64 ``[T]`` each, on the CPU.
        answers: int64 ``[T]`` each, as many.
        temperature: Of the distribution.
    """
    device = model.device
    pairs = list(zip(questions, answers, strict=True))
    ids = pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True)
    mask = pad_sequence([torch.ones(len(q) + len(a), dtype=torch.int64) for q, a in pairs], batch_first=True)
    width = ids.size(1)
    at = torch.cat([torch.arange(len(a)) + len(q) - 1 + i * width for i, (q, a) in enumerate(pairs)])
    row = torch.cat([torch.full((len(a),), i) for i, (_, a) in enumerate(pairs)]).to(device)
    hidden = model.base_model(ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    rows = hidden.flatten(0, 1).index_select(0, at.to(device))  # position t predicts token t + 1
    targets = torch.cat([a for _, a in pairs]).to(device)
    return token_log_probs(rows, head.weight, targets, head.bias, temperature), row
