"""Any number of completions per prompt, where every prompt is run through the model once for all stages.

:func:`prefill` runs all tokens of each prompt but the last and keeps their keys and values. :func:`generate` runs the
last token once for each prompt, repeats keys and values for each of its completions, and samples. A second stage
takes the same cache and costs its own tokens only. A cache belongs to the weights that it was made with.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from curation.checks import check_integer, check_number
from curation.scoring import side_effect_free


@dataclass(frozen=True)
class Completions:
    """Sampled completions, in ascending order of their prompts.

    Attributes:
        prompt_index: int64 ``[R]``, the row of the prompt that each completion follows.
        tokens: int64 ``[R, L]``, padded on the right with ``pad_id``.
        lengths: int64 ``[R]``, the number of tokens of each, the stop token included.
        log_probs: fp32 ``[R, L]``, the log-probability of each token under the whole distribution at the temperature
            of sampling (at 1 for greedy tokens), 0 where padded; None where they are not known.
        finished: bool ``[R]``, whether a stop token ended the completion.
        pad_id: The padding token.
    """

    prompt_index: Tensor
    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor | None
    finished: Tensor
    pad_id: int

    @staticmethod
    def cat(parts: "Sequence[Completions]") -> "Completions":
        """Pool the completions of several stages; those of a prompt stay in the order of the stages."""
        longest = max(part.tokens.size(1) for part in parts)
        prompt_index = torch.cat([part.prompt_index for part in parts])
        order = prompt_index.argsort(stable=True)

        def pooled(rows: list[Tensor], pad: int) -> Tensor:
            return torch.cat([F.pad(r, (0, longest - r.size(1)), value=pad) for r in rows])[order]

        log_probs = [part.log_probs for part in parts if part.log_probs is not None]
        return Completions(
            prompt_index[order],
            pooled([part.tokens for part in parts], parts[0].pad_id),
            torch.cat([part.lengths for part in parts])[order],
            pooled(log_probs, 0) if len(log_probs) == len(parts) else None,
            torch.cat([part.finished for part in parts])[order],
            parts[0].pad_id,
        )


@dataclass(frozen=True)
class _Batch:
    """Prompts that were run through the model together, padded on the left to ``W + 1`` tokens."""

    prompt_index: Tensor  # int64 [b] on the CPU, the rows of the prompts
    last: Tensor  # int64 [b], the last token, which is not run yet
    positions: Tensor  # int64 [b], the position of that token
    mask: Tensor  # int64 [b, W]
    padded: bool
    cache: Any  # None where W = 0


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of ``P`` prompts, from :func:`prefill`.

    Attributes:
        batches: The prompts that were run together.
        lengths: int64 ``[P]`` on the CPU, the number of tokens of each prompt.
        pad_id: The padding token.
    """

    batches: list[_Batch]
    lengths: Tensor
    pad_id: int

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens run through the model, without padding; :func:`generate` runs one for each prompt."""
        return int(self.lengths.sum()) - len(self.lengths)


def prefill(model: Any, prompts: Sequence[Tensor], pad_id: int, token_budget: int) -> PromptCache:
    """Run all tokens of each prompt but the last through a model, those of similar length together.

    Args:
        model: A causal language model of transformers; it is run in evaluation mode, without gradient.
        prompts: ``P`` tensors int64 ``[n]``, on any device.
        pad_id: The padding token of prompts and completions.
        token_budget: Largest number of tokens of a forward pass, padding included; a longer prompt is run alone.

    Raises:
        TypeError: If the model keeps no keys and values; see :func:`from_sequences`.
        ValueError: If ``pad_id`` is not a token, ``token_budget`` is not a positive integer, or a prompt is empty,
            not int64 ``[n]`` or longer than the context.
    """
    check_integer("token_budget", token_budget, 1)
    embedding = model.get_input_embeddings().weight
    check_integer("pad_id", pad_id, 0, len(embedding))
    context = context_length(model)
    for i, prompt in enumerate(prompts):
        if prompt.dtype != torch.int64 or prompt.dim() != 1 or not 0 < len(prompt) <= context:
            raise ValueError(
                f"Argument `prompts` must be int64 [n] each, of 1 to {context} tokens, but prompt {i} is "
                f"{prompt.dtype} {list(prompt.shape)}."
            )
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    batches = []
    with side_effect_free(model):
        for rows in _groups(lengths.tolist(), token_budget):
            ids = pad_sequence([prompts[i] for i in rows], True, pad_id, padding_side="left").to(embedding.device)
            last = (lengths[rows] - 1).to(ids.device)
            positions = torch.arange(1 - ids.size(1), 0, device=ids.device) + last[:, None]
            mask, padded, cache = positions.ge(0).long(), bool(lengths[rows[0]] < lengths[rows[-1]]), None
            if ids.size(1) > 1:
                seen = mask if padded else None
                _, cache = _run(model, ids[:, :-1], seen, positions.clamp(min=0), None, answers=False)
            batches.append(_Batch(torch.tensor(rows), ids[:, -1], last, mask, padded, cache))
    return PromptCache(batches, lengths, pad_id)


def generate(
    model: Any,
    cache: PromptCache,
    counts: Tensor | np.ndarray,
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    token_budget: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    expected_lengths: Tensor | np.ndarray | None = None,
) -> Completions:
    """Sample completions of the prompts in a cache, which stays as it is.

    Rows are decoded in batches. Finished rows are removed once they are an eighth of their batch. Nothing of
    ``model.generation_config`` is applied. The same arguments and generator state give the same completions; another
    ``token_budget``, or other counts, change the completions of every prompt.

    Args:
        model: The model that the cache was made with.
        cache: The keys and values of ``P`` prompts.
        counts: int64 ``[P]``, the number of completions of each prompt.
        max_new_tokens: Largest number of tokens of a completion, the stop token included.
        stop_ids: Tokens that end a completion; may be empty.
        token_budget: Largest number of tokens of a batch, padding and ``max_new_tokens`` included; a longer row is
            decoded alone.
        generator: Source of the random draws, not a global one; if it is on another device than the model, it seeds a
            generator there.
        temperature: Divisor of the logits; 0 takes the most probable token.
        expected_lengths: ``[P]``, the expected number of tokens of each prompt's completions: rows that end together
            are decoded together. None decodes rows in the order of the cache.

    Returns:
        ``counts.sum()`` completions, on the model's device.

    Raises:
        TypeError: If the model keeps no keys and values.
        ValueError: If an argument is out of its range, or not of length ``P``.
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    check_integer("token_budget", token_budget, 1)
    check_number("temperature", temperature, "[0, inf)")
    size = len(cache.lengths)
    counts = torch.as_tensor(counts).cpu()
    if counts.is_floating_point() or counts.shape != (size,) or bool(counts.lt(0).any()):
        raise ValueError(f"Argument `counts` must be {size} integers >= 0, but got {counts.tolist()}.")
    expected = torch.zeros(size) if expected_lengths is None else torch.as_tensor(expected_lengths).cpu()
    if expected.shape != (size,):
        raise ValueError(f"Argument `expected_lengths` must be [{size}], but got {list(expected.shape)}.")
    room = context_length(model) - max([0, *cache.lengths.tolist()])
    if max_new_tokens > room:
        raise ValueError(
            f"Argument `max_new_tokens` must be in [1, {room}], what the longest prompt leaves of the context, but "
            f"got {max_new_tokens!r}."
        )
    if generator in (torch.default_generator, *torch.cuda.default_generators):  # these are put back: always the same
        raise ValueError(f"Argument `generator` must not be a global one, but got {generator!r}.")
    device = model.get_input_embeddings().weight.device
    if generator.device.type != device.type:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        generator = torch.Generator(device).manual_seed(seed)
    sample = partial(_sample, temperature=temperature, generator=generator)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    parts = [Completions(none, none.view(0, 0), none, none.view(0, 0).float(), none.bool(), cache.pad_id)]
    with side_effect_free(model):
        for batch in cache.batches:
            rows = torch.arange(len(batch.prompt_index)).repeat_interleave(counts[batch.prompt_index])
            rows = rows[expected[batch.prompt_index][rows].argsort(stable=True)]
            parts += [
                _decode(model, batch, part, max_new_tokens, stops, cache.pad_id, sample)
                for part in rows.split(max(1, token_budget // (batch.mask.size(1) + 1 + max_new_tokens)))
                if len(part)
            ]
    return Completions.cat(parts)


def from_sequences(
    prompt_index: Tensor, sequences: Tensor, prompt_width: int, stop_ids: Iterable[int], pad_id: int
) -> Completions:
    """Completions, without log-probabilities, from the output of a model's own ``generate``.

    Args:
        prompt_index: int64 ``[R]``, the row of each sequence's prompt.
        sequences: int64 ``[R, prompt_width + L]``; tokens after a stop token, and ``pad_id`` at the end, are padding.
        prompt_width: Number of tokens of the padded prompts.
        stop_ids: Tokens that end a completion.
        pad_id: The padding token of the completions.

    Raises:
        ValueError: If ``prompt_width`` or ``pad_id`` is not an integer >= 0.

    Example:
        >>> sequences = torch.tensor([[9, 4, 5, 7], [9, 6, 7, 0]])
        >>> completions = from_sequences(torch.tensor([0, 0]), sequences, 1, stop_ids=[7], pad_id=0)
        >>> completions.tokens.tolist(), completions.lengths.tolist()
        ([[4, 5, 7], [6, 7, 0]], [3, 2])
    """
    check_integer("prompt_width", prompt_width, 0)
    check_integer("pad_id", pad_id, 0)
    tokens = sequences[:, prompt_width:]
    is_stop = _any_of(tokens, torch.tensor(list(stop_ids), dtype=torch.int64, device=tokens.device))
    padding = tokens.eq(pad_id).flip(1).cumprod(1).flip(1).bool()
    kept = (is_stop | ~padding) & (is_stop.cumsum(1) <= is_stop)  # a stop token may be the padding token
    tokens = tokens.masked_fill(~kept, pad_id)
    return Completions.cat([Completions(prompt_index, tokens, kept.sum(1), None, is_stop.any(1), pad_id)])


def context_length(model: Any) -> float:
    """The number of tokens that the model can attend to; infinite where its configuration has none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or torch.inf


def _groups(lengths: list[int], token_budget: int) -> Iterator[list[int]]:
    """Rows of prompts that are run together, in ascending order of length."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        # A prompt of one token has nothing to run: with longer ones it would be a row of padding alone.
        separate = bool(group) and lengths[group[0]] == 1 < lengths[row]
        if separate or (group and (len(group) + 1) * (lengths[row] - 1) > token_budget):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _run(
    model: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, answers: bool = True
) -> tuple[Tensor, Any]:
    """Logits ``[b, V]`` of the last position, ``[b, 0, V]`` where no answer follows; and the cache."""
    inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    kept = 1 if answers else ids.new_empty(0)  # an integer 0 keeps all
    output = model(ids, **inputs, use_cache=True, logits_to_keep=kept)
    if getattr(output, "past_key_values", None) is None:
        raise TypeError(f"{type(model).__name__} keeps no keys and values; see `from_sequences` for its `generate`.")
    return output.logits[:, -1] if answers else output.logits, output.past_key_values


def _of_rows(cache: Any, rows: Tensor, size: int) -> Any:
    """Another cache with some of the ``size`` rows, distinct and rising; where that is all, keys are not copied."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    other: Any
    if type(cache) is DynamicCache:
        other = copy.copy(cache)  # its plain layers make new tensors, whatever comes; others may write into theirs
        other.layers = [(copy.copy if type(x) is DynamicLayer else copy.deepcopy)(x) for x in cache.layers]
    else:
        other = copy.deepcopy(cache)
    if len(rows) < size:
        other.reorder_cache(rows)
    return other


def _repeated(cache: Any, rows: Tensor, new_tokens: int) -> Any:
    """The cache with some rows in the place of its own, and room for new tokens, which is made before: one copy."""
    roomy = _roomy_layer()  # in the place of its base only: layers of other kinds hold less than all keys, or more
    cache.layers = [roomy(layer, new_tokens) if type(layer) is roomy.__base__ else layer for layer in cache.layers]
    cache.reorder_cache(rows)  # not `batch_select_indices`, which leaves out the states of linear attention
    return cache


@lru_cache
def _roomy_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Writes new tokens into memory allocated before; a ``DynamicLayer`` copies its content for each token."""

        def __init__(self, layer: Any, new_tokens: int) -> None:
            super().__init__()
            vars(self).update(vars(layer))
            self.room = [F.pad(t, (0, 0, 0, new_tokens)) for t in (layer.keys, layer.values)]
            self.fill(layer.keys.size(-2))

        def fill(self, tokens: int) -> tuple[Tensor, Tensor]:
            self.tokens = tokens
            self.keys, self.values = keys, values = self.room[0][:, :, :tokens], self.room[1][:, :, :tokens]
            return keys, values

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            start = self.tokens
            keys, values = self.fill(start + key_states.size(-2))
            keys[:, :, start:], values[:, :, start:] = key_states, value_states
            return keys, values

        def reorder_cache(self, beam_idx: Any) -> None:
            self.room = [t.index_select(0, beam_idx) for t in self.room]
            self.fill(self.tokens)

    return RoomyLayer


def _tokens_between_checks(device: torch.device) -> int:
    """Tokens between two checks of which rows have finished; on a GPU the host waits for each check."""
    return 1 if device.type == "cpu" else 8


def _any_of(tokens: Tensor, stops: Tensor) -> Tensor:
    return tokens[..., None].eq(stops).any(-1)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens int64 ``[b]`` and their log-probabilities, fp32 ``[b]``."""
    scaled = logits.float() if temperature in (0, 1) else logits.float() / temperature
    log_p = scaled.log_softmax(-1)
    drawn = _drawn(log_p.exp(), generator) if temperature else logits.argmax(-1, keepdim=True)
    return drawn[:, 0], log_p.gather(1, drawn)[:, 0]


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """A column for each row, with probabilities ``[b, V]``: int64 ``[b, 1]``."""
    if p.device.type != "cpu":
        return torch.multinomial(p, 1, generator=generator)
    total = p.cumsum(-1)  # one random number a row, where `multinomial` draws one for each of V tokens
    last = total[:, -1:]
    place = torch.rand(last.shape, dtype=p.dtype, generator=generator) * last
    return torch.searchsorted(total, place.minimum(last.nextafter(torch.zeros_like(last))), right=True)


def _decode(
    model: Any, batch: _Batch, rows: Tensor, max_new_tokens: int, stops: Tensor, pad_id: int, sample: Callable
) -> Completions:
    """One completion for each of some rows of a batch, int64 ``[R]``; a row may occur several times."""
    device = stops.device
    prompt_index = batch.prompt_index[rows].to(device)
    once, repeats = (t.to(device) for t in rows.unique(return_inverse=True))
    rows = rows.to(device)
    mask = F.pad(batch.mask[rows], (0, max_new_tokens), value=1)
    positions, live = batch.positions[rows], torch.arange(len(rows), device=device)
    cache: Any = None if batch.cache is None else _of_rows(batch.cache, once, len(batch.mask))
    # Models read the values of a mask, and the host waits for them: no mask where nothing is padded.
    seen = F.pad(batch.mask[once], (0, 1), value=1) if batch.padded else None
    logits, cache = _run(model, batch.last[once][:, None], seen, batch.positions[once][:, None], cache)
    logits, cache = logits[repeats], _repeated(cache, repeats, max_new_tokens - 1)
    tokens = torch.full((len(rows), max_new_tokens), pad_id, device=device)
    log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    lengths, finished = torch.zeros_like(live), torch.zeros_like(live, dtype=torch.bool)
    for step in range(1, max_new_tokens + 1):
        token, log_prob = sample(logits)
        running = ~finished[live]
        tokens[live, step - 1] = token.where(running, pad_id)
        log_probs[live, step - 1] = log_prob.where(running, 0)
        lengths[live] += running
        finished[live] |= _any_of(token, stops)
        if step == max_new_tokens:
            break
        if step % _tokens_between_checks(device) == 0:
            unfinished = (~finished[live]).nonzero()[:, 0]
            if len(unfinished) == 0:
                break
            if 8 * len(unfinished) <= 7 * len(live):
                live, token, positions, mask = (t[unfinished] for t in (live, token, positions, mask))
                cache.reorder_cache(unfinished)
        visible = mask[:, : batch.mask.size(1) + step + 1] if batch.padded else None
        logits, cache = _run(model, token[:, None], visible, positions[:, None] + step, cache)
    longest = int(lengths.max())
    return Completions(prompt_index, tokens[:, :longest], lengths, log_probs[:, :longest], finished, pad_id)
