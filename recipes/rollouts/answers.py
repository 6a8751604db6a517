"""Answers of a policy: tokens, rewards and texts, batches of them, and log-probabilities under a model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from curation.recipes.causal_lm import OwnLogits
from curation.rollouts.generation import Completions, context_length, generate, prefill
from curation.scoring import side_effect_free


@dataclass
class Rollouts:
    """Answers of a policy with their rewards, in ascending order of their prompts.

    Attributes:
        completions: The tokens of ``R`` answers, on the device of the policy.
        rewards: fp32 ``[R]`` in [0, 1], on the CPU.
        texts: The text of each answer.
    """

    completions: Completions
    rewards: Tensor
    texts: list[str]

    @property
    def prompt_index(self) -> Tensor:
        """int64 ``[R]`` on the CPU, ascending: the row of the batch that each answer belongs to."""
        return self.completions.prompt_index.cpu()

    def pool(self, other: "Rollouts") -> "Rollouts":
        """The answers of two stages of one batch; those of a prompt stay in the order of the stages."""
        order = torch.cat([self.prompt_index, other.prompt_index]).argsort(stable=True)
        texts = [*self.texts, *other.texts]
        return Rollouts(
            Completions.cat([self.completions, other.completions]),
            torch.cat([self.rewards, other.rewards])[order],
            [texts[i] for i in order.tolist()],
        )

    def rows(self, rows: Tensor) -> "Rollouts":
        """Some of the answers, int64 ``[r]`` on the CPU, ascending."""
        device = self.completions.tokens.device
        parts: dict[str, Any] = {field.name: getattr(self.completions, field.name) for field in fields(Completions)}
        parts = {n: v.to(device)[rows.to(device)] if isinstance(v, Tensor) else v for n, v in parts.items()}
        return Rollouts(Completions(**parts), self.rewards[rows], [self.texts[i] for i in rows.tolist()])

    def cpu(self) -> "Rollouts":
        """The same answers with all tensors on the CPU, copied at once and not row by row."""
        values: dict[str, Any] = {field.name: getattr(self.completions, field.name) for field in fields(Completions)}
        moved: dict[str, Any] = {
            name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()
        }
        return Rollouts(Completions(**moved), self.rewards, self.texts)


def packed(rows: Tensor, widths: Tensor, token_budget: int) -> Iterator[Tensor]:
    """Split rows into batches of at most ``token_budget`` tokens, padding included; the longest rows come first.

    Args:
        rows: int64 ``[R]``, the rows.
        widths: int64 ``[R]``, the number of tokens of each row.
        token_budget: Largest number of tokens of a batch; a longer row is a batch of its own.

    Yields:
        int64 ``[r]``, the rows of a batch.

    Example:
        >>> [part.tolist() for part in packed(torch.arange(4), torch.tensor([2, 5, 4, 1]), 10)]
        [[1, 2], [0, 3]]
    """
    order = widths.argsort(descending=True, stable=True)
    start = 0
    while start < len(rows):
        size = max(1, token_budget // int(widths[order[start]]))
        yield rows[order[start : start + size]]
        start += size


def answer_log_probs(
    logits: OwnLogits, questions: Iterable[Tensor], answers: Iterable[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the ``N`` tokens of all answers, one answer after the other.

    Args:
        logits: The logits of the model.
        questions: The tokens of each question, int64 ``[T]``, on the CPU.
        answers: The tokens of each answer, int64 ``[T]``, on the CPU; as many as questions.
        temperature: Divisor of the logits.

    Returns:
        The log-probabilities, fp32 ``[N]``, and the number of the answer that each token belongs to, int64 ``[N]``.
    """
    device = logits.model.device
    pairs = list(zip(questions, answers, strict=True))
    ids = pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True)
    mask = pad_sequence([torch.ones(len(q) + len(a), dtype=torch.int64) for q, a in pairs], batch_first=True)
    width = ids.size(1)
    # Position t predicts token t + 1.
    positions = torch.cat([torch.arange(len(a)) + len(q) - 1 + i * width for i, (q, a) in enumerate(pairs)])
    answer_index = torch.cat([torch.full((len(a),), i) for i, (_, a) in enumerate(pairs)]).to(device)
    targets = torch.cat([a for _, a in pairs]).to(device)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return logits.log_probs(positions.to(device), targets, temperature, **inputs), answer_index


def check_sampling(logits: OwnLogits, pad_id: int) -> None:
    """Refuse a model whose answers are sampled with other probabilities than they are learned by.

    Two short prompts of unequal lengths are answered, so that one is padded, and their probabilities compared.

    Args:
        logits: The logits of the model.
        pad_id: The padding token.

    Raises:
        TypeError: If the probabilities differ by more than rounding, or the model cannot be run token by token.
    """
    model, name = logits.model, type(logits.model).__name__
    embedding = model.get_input_embeddings().weight
    context = int(min(context_length(model), 14))
    new_tokens = max(1, min(5, context - context // 2))
    prompts = [torch.arange(2, 2 + max(1, n)) % len(embedding) for n in (context // 4, context // 2)]
    try:
        cache = prefill(model, prompts, pad_id, 1024)
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "stop_ids": [], "token_budget": 1024}
        sampled = generate(model, cache, torch.ones(2, dtype=torch.int64), generator=generator, **options)
        with side_effect_free(model):
            learned, _ = answer_log_probs(logits, prompts, list(sampled.tokens.cpu()), 1.0)
    except Exception as error:  # models raise anything
        raise TypeError(f"{name} cannot be sampled from token by token: {type(error).__name__}: {error}") from error
    assert sampled.log_probs is not None
    difference = float((learned - sampled.log_probs.flatten()).abs().max())
    if not difference <= max(1e-2, 64 * torch.finfo(embedding.dtype).eps):
        raise TypeError(
            f"{name} samples token by token with other probabilities than those of a whole text (log-probabilities "
            f"differ by {difference:.3g}), often since its positions or masks do not follow `position_ids` and "
            "`attention_mask`."
        )
