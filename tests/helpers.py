"""Small real modules and runs that the tests share."""

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from curation.batch import SampleIds
from curation.scoring import side_effect_free

CLASSES, FEATURES, VOCABULARY = 4, 8, 200


class Classifier(LightningModule):
    """BatchNorm and dropout, so that a scoring pass that is not free of side effects shows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES)
            )
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(len(x))
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))
        self.seen_in_validation = len(x)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        x, _ = batch
        return self(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ManualClassifier(Classifier):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()


class Accumulating(Classifier):
    """Its steps have the batches that a callback says."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.accumulation = None


class ManualAccumulating(Accumulating):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx) / self.accumulation.size)
        if self.accumulation.ends:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
                optimizer.zero_grad()


class Experts(nn.Module):
    """Two of four experts for each row."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.router, self.top_k = nn.Linear(width, 4), 2
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return x + (weights[..., None] * outputs.gather(1, chosen[..., None].expand(-1, -1, x.size(1)))).sum(1)


class Routed(Classifier):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(*self.net[:4], Experts(), self.net[4])


class ManualRouted(ManualClassifier, Routed):
    pass


@dataclass
class Answers:
    """Rollouts of a classifier: its answer is always that of the highest logit."""

    prompt_index: Tensor
    rewards: Tensor

    def pool(self, other: "Answers") -> "Answers":
        index = torch.cat([self.prompt_index, other.prompt_index])
        return Answers(index, torch.cat([self.rewards, other.rewards]))


class Answering(Classifier):
    """A sample weighs as much as it has rollouts."""

    def rollout(self, batch, counts):
        with side_effect_free(self):
            right = (self(batch[0]).argmax(1) == batch[1]).float()
        prompt_index = torch.arange(len(right)).repeat_interleave(torch.as_tensor(counts))
        return Answers(prompt_index, right.cpu()[prompt_index])

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(len(x))
        index = self.rollout(batch, [2] * len(x)).prompt_index
        counts = torch.bincount(index, minlength=len(x)).to(x.device)
        loss = (counts * F.cross_entropy(self(x), y, reduction="none")).mean()
        self.log("train_loss", loss)
        return loss


class ManualAnswering(ManualClassifier, Answering):
    pass


class Proxy(LightningModule):
    """Scores batches of pairs with BatchNorm and dropout, and batches of texts by fixed features of their tokens."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES))
            self.waves = nn.Parameter(torch.randn(8))

    def score_step(self, batch):
        if not isinstance(batch, dict):
            return self.net(batch[0]), batch[1]
        x, waves = batch["input_ids"][:, :-1, None, None], torch.arange(1, 9)
        features = torch.cos(waves * (x + 1) * torch.arange(1, VOCABULARY + 1)[:, None] / VOCABULARY)
        return features @ self.waves, batch["labels"][:, 1:]

    def training_step(self, batch):
        logits, targets = self.score_step(batch)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        self.log("train_loss", loss)  # of the large model, if it were not left out
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(Callback):
    """Remembers what every later hook sees: the batches, and the ids that were trained on."""

    def __init__(self) -> None:
        self.batches: list = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)


def data(n: int = 64, seed: int = 1) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, FEATURES, generator=g), torch.randint(0, CLASSES, (n,), generator=g))


def loader(n: int = 64, batch_size: int = 8, ids: bool = True, shuffle: bool = True, **kwargs) -> DataLoader:
    dataset = SampleIds(data(n)) if ids else data(n)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, **kwargs)


def trainer(*callbacks: Callback, **kwargs) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    y: Tensor


class AnyBatch(Classifier):
    """Takes (x, y) out of whatever container its batches are."""

    @staticmethod
    def unpack(batch):
        if isinstance(batch, Tensor):
            return batch[:, :FEATURES], batch[:, FEATURES].long()
        if isinstance(batch, dict):
            batch = batch["fields"] if "fields" in batch else (batch["x"], batch["y"])
        if isinstance(batch, Record):
            return batch.x, batch.y
        return batch[0], batch[1]

    def score_step(self, batch):
        x, y = self.unpack(batch)
        return self(x), y

    def training_step(self, batch, batch_idx):
        return super().training_step(self.unpack(batch), batch_idx)


def stack(samples):
    return torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])


COLLATES = {
    "list": lambda s: list(stack(s)),
    "tuple": lambda s: stack(s),
    "namedtuple": lambda s: Pair(*stack(s)),
    "dataclass": lambda s: Record(*stack(s)),
    "dict": lambda s: dict(zip("xy", stack(s), strict=True)),
    "tensor": lambda s: torch.cat([stack(s)[0], stack(s)[1][:, None].float()], dim=1),
    "nested": lambda s: {"fields": [*stack(s)], "meta": {"name": [str(i) for i in range(len(s))], "epoch": 3}},
}


class LanguageModel(LightningModule):
    def __init__(self, soft_cap: float | None = None, lr: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
            )  # fmt: skip
            self.model = LlamaForCausalLM(config)
        if soft_cap:
            plain = self.model.forward

            def forward(*args, **kwargs):
                output = plain(*args, **kwargs)
                output.logits = soft_cap * (output.logits / soft_cap).tanh()
                return output

            self.model.forward = forward

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def texts(n=48, pad_to=None):
    g = torch.Generator().manual_seed(3)
    samples = []
    for _ in range(n):
        length = int(torch.randint(4, 20, (), generator=g))
        ids = torch.randint(3, VOCABULARY, (length,), generator=g)
        width = pad_to or 20
        labels = F.pad(ids, (0, width - length), value=-100)
        labels[:2] = -100
        mask = F.pad(torch.ones_like(ids), (0, width - length))
        samples.append({"input_ids": F.pad(ids, (0, width - length)), "attention_mask": mask, "labels": labels})
    return samples
