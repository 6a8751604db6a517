"""Conversations as token ids: reading them, splitting them, and labelling their last answers."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from curation.batch import SAMPLE_ID, SampleIds
from curation.checks import check_choice, check_integer, check_seed, check_text
from curation.recipes.library_texts import questions
from curation.recipes.pretrained import load_tokenizer
from curation.recipes.smollm2 import SMOLLM2, SMOLLM2_GGUF
from curation.recipes.sources import AUTO, Source, found, installed, resolve, sampled
from curation.scoring import IGNORED

CHATS = (
    Source("chitchat", "7,168 conversations of the package chitchat-dataset", installed("chitchat_dataset")),
    Source("library", "questions about Python's standard library, answered by its docstrings"),
)


class Conversations(LightningDataModule):
    """Conversations as token ids, of which only the last answer is labelled.

    Samples longer than ``max_length`` tokens are left out. The split into training, validation and test is by
    conversation and depends on the seed only. Training samples have a stable ``sample_id``: their index in the
    training set.

    Args:
        data: ``"chitchat"`` (the ``chitchat-dataset`` package), ``"reasoning_gym:FAMILY"`` (8,192 questions of one
            task family of that package), ``"library"`` (questions about Python's standard library, answered by its
            docstrings), a ``.jsonl`` file, or a hub name. Rows of the last two have the column ``messages``, or
            ``prompt`` and ``answer``, or ``question`` and ``answer``. ``"auto"`` is ``"chitchat"`` where that package
            is installed, or else ``"library"``.
        subset: Configuration of a hub data set that has several.
        tokenizer: Folder, hub name, or ``package:NAME``, with a chat template; None takes that of the model.
        gguf_file: File in that folder, where the tokenizer is in GGUF format; with ``tokenizer`` only.
        batch_size: Number of candidates per training batch and process, and of samples per validation batch.
        max_length: Largest number of tokens of a sample that is used.
        context_turns: Largest number of turns before the answer, in ``"chitchat"``.
        replies: What a training sample is: ``"last"`` is a reply with its context, of which the reply is labelled;
            ``"all"`` is a conversation with every reply labelled, as far as ``max_length`` goes, so that no context
            is computed twice. Validation is by reply.
        max_samples: Largest number of training samples, before the long ones are left out; None takes all.
        val_samples: Number of validation samples, and of test samples, before the long ones are left out.
        sampler: Makes the sampler of the training batches from the data set and ``batch_size``; None reshuffles every
            epoch.
        num_workers: Number of worker processes of each data loader.
        seed: Seed of the split.

    Raises:
        ValueError: If an argument is out of its range, a row cannot be read, or no sample is left.
        FileNotFoundError: If ``data`` is a file that is not there.
    """

    auto_sources: ClassVar = {"data": CHATS}

    def __init__(
        self,
        data: str = AUTO,
        subset: str | None = None,
        tokenizer: str | None = None,
        gguf_file: str | None = None,
        batch_size: int = 32,
        max_length: int = 128,
        context_turns: int = 3,
        replies: Literal["last", "all"] = "last",
        max_samples: int | None = None,
        val_samples: int = 256,
        sampler: Callable[[Any, int], Sampler] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data: str = found(self.auto_sources, {"data": check_text("data", data)})["data"]
        self.subset: str | None = check_text("subset", subset, optional=True)
        self.tokenizer: str | None = check_text("tokenizer", tokenizer, optional=True)
        self.gguf_file: str | None = check_text("gguf_file", gguf_file, optional=True)
        self.batch_size: int = check_integer("batch_size", batch_size, 1)
        self.max_length: int = check_integer("max_length", max_length, 1)
        self.context_turns: int = check_integer("context_turns", context_turns, 1)
        self.replies = check_choice("replies", replies, ("last", "all"))
        self.max_samples: int | None = check_integer("max_samples", max_samples, 1, optional=True)
        self.val_samples: int = check_integer("val_samples", val_samples, 1)
        self.sampler = sampler
        self.num_workers: int = check_integer("num_workers", num_workers, 0)
        self.seed = check_seed(seed)
        self.train: SampleIds | None = None
        self.val: Any = None
        self.test: Any = None
        self.vocabulary = 0

    def setup(self, stage: str) -> None:
        """Split and tokenise the data, if that has not been done."""
        if self.train is not None:
            return
        name, gguf_file = self.tokenizer, self.gguf_file
        if name is None:
            model = self.trainer.lightning_module.hparams if self.trainer is not None else {}
            name, gguf_file = model.get("model", SMOLLM2), model.get("gguf_file", SMOLLM2_GGUF)
        tokenizer = load_tokenizer(name, gguf_file)
        if tokenizer.chat_template is None:
            raise ValueError(f"Argument `tokenizer` must have a chat template, but {name!r} has none.")
        self.vocabulary, self.text = len(tokenizer), tokenizer
        parts = self.split()
        ways = (self.replies, "last", "last")
        encoded = [encode(part, tokenizer, self.max_length, way) for part, way in zip(parts, ways, strict=True)]
        kept = ", ".join(
            f"{len(used)} of {len(part)} {name} samples"
            for used, part, name in zip(encoded, parts, ("training", "validation", "test"), strict=True)
        )
        rank_zero_info(f"Conversations: {kept} have at most {self.max_length} tokens; the others are left out.")
        if not all(map(len, encoded)):
            raise ValueError(
                f"Argument `data` must hold samples of at most `max_length` ({self.max_length}) tokens in more "
                f"conversations than twice `val_samples` ({self.val_samples}) takes, but {self.data!r} gave {kept}."
            )
        self.train, self.val, self.test = SampleIds(encoded[0]), encoded[1], encoded[2]

    def split(self) -> tuple[Any, Any, Any]:
        """A ``Dataset`` of ``{"conversation": int, "messages": [...]}`` for training, validation and test."""
        samples = load(self.data, self.subset, self.context_turns)
        conversations = samples.with_format("numpy")["conversation"][:]
        rank = np.random.default_rng(self.seed).permutation(conversations.max() + 1)[conversations]
        rest = np.argsort(rank, kind="stable")  # whole conversations, shuffled
        held_out = []
        for _ in ("validation", "test"):
            part, rest = rest[: self.val_samples], rest[self.val_samples :]
            rest = rest[rank[rest] > rank[part].max(initial=-1)]
            held_out.append(part)
        train = samples
        if self.replies == "all":  # the last reply of a conversation, with all that was said before
            train = load(self.data, self.subset, None)
            rest = rest[np.diff(rank[rest], append=-1) != 0]
        return train.select(rest[: self.max_samples]), *map(samples.select, held_out)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Right-padded tensors int64 ``[B, T]``, ``T`` the longest sample, and the ids ``[B]`` in training."""
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        batch = {
            key: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(s[key]) for s in samples], batch_first=True, padding_value=fill
            )
            for key, fill in fills.items()
        }
        if SAMPLE_ID in samples[0]:
            batch[SAMPLE_ID] = torch.tensor([s[SAMPLE_ID] for s in samples])
        return batch

    def train_dataloader(self) -> DataLoader:
        """Training batches, as the sampler draws them."""
        assert self.train is not None
        return DataLoader(
            self.train,
            self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            **sampled(self, self.train, self.sampler),
        )

    def val_dataloader(self) -> DataLoader:
        """All validation samples, in order."""
        return DataLoader(self.val, self.batch_size, num_workers=self.num_workers, collate_fn=self.collate)

    def test_dataloader(self) -> DataLoader:
        """All test samples, in order."""
        return DataLoader(self.test, self.batch_size, num_workers=self.num_workers, collate_fn=self.collate)


def load(data: str, subset: str | None = None, context_turns: int | None = 3) -> Any:
    """A ``Dataset`` of ``{"conversation": int, "messages": [...]}``; the last message is the assistant's.

    Args:
        data: The source of the data, as in :class:`Conversations`.
        subset: Configuration of a hub data set that has several.
        context_turns: Largest number of turns before the answer, in ``"chitchat"``; None takes all.

    Raises:
        ValueError: If a row cannot be read (the message has its number), or an argument does not fit.
        FileNotFoundError: If ``data`` is a file that is not there.
    """
    import datasets

    file = Path(data)
    is_file = file.suffix in (".json", ".jsonl")
    source, _, family = data.partition(":")
    if subset is not None and (is_file or data in ("chitchat", "library") or family):
        raise ValueError(f"Argument `subset` must be None for {data!r}, but got {subset!r}.")
    if data == "chitchat":
        package = Path(resolve("package:chitchat_dataset"))
        return datasets.Dataset.from_list(list(_chitchat(package / "dataset.json", context_turns)))
    if data == "library":
        rows = [{"conversation": i, "messages": _alternate(list(pair))} for i, pair in enumerate(questions())]
        return datasets.Dataset.from_list(rows)
    if source == "reasoning_gym":
        return datasets.Dataset.from_list(list(_reasoning_gym(family)))
    if is_file:
        if not file.is_file() or file.stat().st_size == 0:
            raise FileNotFoundError(f"Argument `data` must name a file with rows, but {data!r} is missing or empty.")
        rows = datasets.load_dataset("json", data_files=data, split="train")
    elif file.is_file():
        raise ValueError(f"Argument `data` must be a .jsonl or .json file or a hub name, but got {data!r}.")
    else:
        rows = datasets.load_dataset(data, subset, split="train")
    return rows.map(
        lambda row, i: {"conversation": i, "messages": _messages(row, i)},
        with_indices=True,
        remove_columns=rows.column_names,
    )


def _messages(row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """The messages of a row up to the assistant's last."""
    if row.get("messages") is not None:
        try:
            messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"Row {number}: `messages` must hold `role` and `content`.") from error
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
    else:
        question = next((row[name] for name in ("prompt", "question") if row.get(name) is not None), None)
        messages = _alternate([question, row.get("answer")])
    for message in messages:
        if isinstance(message["content"], (int, float)):
            message["content"] = str(message["content"])
        if not isinstance(message["content"], str):
            raise ValueError(
                f"Row {number} must have `messages`, or `prompt` and `answer`, or `question` and `answer`, but has "
                f"{sorted(name for name, value in row.items() if value is not None)}."
            )
    if not messages or not messages[-1]["content"].strip():
        raise ValueError(f"Row {number} has no answer of the assistant's.")
    return messages


def _reasoning_gym(family: str) -> Iterable[dict[str, Any]]:
    """Questions of a task family, each a conversation of two messages."""
    resolve("package:reasoning_gym")
    from reasoning_gym.factory import DATASETS, create_dataset

    if family not in DATASETS:
        raise ValueError(f"Argument `data` must name one of the families {sorted(DATASETS)}, but got {family!r}.")
    for i, sample in enumerate(create_dataset(family, size=8192, seed=0)):
        yield {"conversation": i, "messages": _alternate([sample["question"], sample["answer"]])}


def _alternate(turns: list[Any]) -> list[dict[str, Any]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _chitchat(file: Path, context_turns: int | None) -> Iterable[dict[str, Any]]:
    """One sample for each reply of the second speaker, who has the role of the assistant."""
    for i, conversation in enumerate(json.loads(file.read_text(encoding="utf-8")).values()):
        messages = _alternate(["\n".join(part["text"] for part in turn).strip() for turn in conversation["messages"]])
        for end in range(1, len(messages), 2):
            if len(messages[end]["content"]) >= 2:
                begin = 0 if context_turns is None else max(0, end - context_turns)
                yield {"conversation": i, "messages": messages[begin : end + 1]}


def encode(samples: Any, tokenizer: Any, max_length: int, replies: str = "last") -> Any:
    """A ``Dataset`` of ``input_ids``, ``attention_mask`` and ``labels``, without samples over ``max_length`` tokens.

    An answer is tokenised apart from the text before it, as it is when the model generates it. Its end-of-turn token
    is labelled; the white space that the template puts after it is left out.

    Args:
        samples: A ``Dataset`` with the column ``messages``, the last of which is the assistant's.
        tokenizer: A tokenizer with a chat template.
        max_length: Largest number of tokens of a sample.
        replies: ``"last"`` labels the last message; ``"all"`` every one of the assistant's, and cuts a conversation
            after the last that fits.

    Raises:
        ValueError: If the chat template writes earlier messages differently once an answer follows.
    """

    def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        parts = [_parts(messages, tokenizer, replies) for messages in batch["messages"]]
        tokens = iter(tokenizer([text for row in parts for text in row], add_special_tokens=False)["input_ids"])
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in parts:
            ids: list[int] = []
            labels: list[int] = []
            for prompt, answer in [(next(tokens), next(tokens)) for _ in row[::2]]:
                if len(ids) + len(prompt) + len(answer) > max_length:
                    break
                ids += prompt + answer
                labels += [IGNORED] * len(prompt) + answer
            if ids:
                rows["input_ids"].append(ids)
                rows["attention_mask"].append([1] * len(ids))
                rows["labels"].append(labels)
        return rows

    return samples.map(encode_batch, batched=True, remove_columns=samples.column_names)


def _parts(messages: list[dict[str, Any]], tokenizer: Any, replies: str) -> list[str]:
    """The text of a conversation, cut before and after each answer: prompt, answer, prompt, answer."""
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
    parts, done = [], ""
    for end in ends if replies == "all" else [len(messages) - 1]:
        prompt = tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages[: end + 1], tokenize=False)
        if not (text.startswith(prompt) and prompt.startswith(done)):
            raise ValueError(
                "The chat template does not repeat the prompt before the answer."
                if replies == "last" or not text.startswith(prompt)
                else "Argument `replies` must be 'last' with this chat template, which writes earlier turns anew "
                "once others follow, so that a conversation is no one sample."
            )
        answer = text[len(prompt) :].rstrip()
        parts += [prompt[len(done) :], answer]
        done = prompt + answer
    return parts
