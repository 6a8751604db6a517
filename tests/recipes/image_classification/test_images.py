"""Image recipes on scikit-learn's digits, and files in the format of MNIST."""

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Subset

from curation.callbacks import (
    DynamicDataPruning,
    HardSampleSelection,
    SampleRecord,
    UniformSelection,
)
from curation.recipes import cli
from curation.recipes.catalogue import find_recipe
from curation.recipes.compare.arms import configure, make_arm, resolve
from curation.recipes.compare.workload import arm_names
from curation.recipes.image_classification import CorruptedShare, ImageClassifier, Images
from curation.recipes.image_classification.fashion_mnist import load_images
from curation.recipes.image_classification.image_classifier import varied
from curation.recipes.image_classification.images import long_tailed
from curation.recipes.irreducible_losses import irreducible_losses
from curation.samplers import DynamicDataPruningSampler
from curation.scoring import per_sample_loss

QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DIGITS = ["--data.data=digits", "--data.batch_size=64", *QUIET]


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        *("fashion_mnist_noisy", "fashion_mnist_hard_batches", "fashion_mnist_pruning", "fashion_mnist_proxy"),
        "fashion_mnist_batch_size",
        "fashion_mnist_audit",
    ],
)
def test_a_recipe_runs_on_digits(recipe):
    run = cli.run(["fit", "--config", recipe, *DIGITS, "--trainer.max_steps=12", "--trainer.val_check_interval=4"])
    assert run.trainer.global_step == 12
    assert 0 < float(run.trainer.callback_metrics["val_accuracy"]) <= 1


def test_a_proxy_leaves_wrong_labels_out():
    run = cli.run(
        ["fit", "--config=fashion_mnist_proxy", *DIGITS, "--data.batch_size=256", "--trainer.max_steps=150",
         "--trainer.callbacks.update_every=1", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=50"]
    )  # fmt: skip
    metrics = run.trainer.callback_metrics
    assert metrics["curation/kept_corrupted"] < metrics["curation/all_corrupted"] - 0.05


def test_label_noise_is_the_share_asked_for_and_is_known():
    clean, noisy = Images(data="digits"), Images(data="digits", label_noise=0.4)
    for data in (clean, noisy):
        data.setup("fit")
    (x, y), (also_x, wrong) = (d.train.dataset.tensors for d in (clean, noisy))
    assert torch.equal(x, also_x)
    assert torch.equal(y != wrong, noisy.corrupted)
    assert float(noisy.corrupted.float().mean()) == pytest.approx(0.4, abs=0.04)
    counts = torch.bincount(wrong[noisy.corrupted], minlength=10)
    assert counts.min() > 0.6 * counts.float().mean()
    assert torch.equal(clean.val.tensors[1], noisy.val.tensors[1])
    assert not clean.corrupted.any()


def test_a_long_tail_is_of_the_training_images_only():
    whole, tailed = Images(data="digits"), Images(data="digits", imbalance=10)
    for data in (whole, tailed):
        data.setup("fit")
    (x, y), (few, labels) = (d.train.dataset.tensors for d in (whole, tailed))
    most = int(y.bincount().max())
    expected = [min(round(most * 10 ** (-c / 9)), int((y == c).sum())) for c in range(10)]
    assert labels.bincount().tolist() == expected
    assert {row.numpy().tobytes() for row in few} < {row.numpy().tobytes() for row in x}
    assert torch.equal(whole.val.tensors[0], tailed.val.tensors[0])
    assert tailed.concepts.ids.tolist() == labels.tolist()
    assert tailed.concepts.names == range(10)


def test_a_long_tail_leaves_the_fewest_that_are_asked_for():
    labels = torch.arange(60) % 3
    for rarest, counts in ((1, [20, 2, 1]), (4, [20, 4, 4]), (50, [20, 20, 20])):
        assert labels[long_tailed(labels, 100.0, rarest)].bincount().tolist() == counts


def test_the_long_tail_is_trained_on_evenly_and_drawn():
    args = [*DIGITS, *QUIET[1:], "--data.imbalance=10"]
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs"]
    run = cli.run(["fit", "--config", "fashion_mnist_long_tail", *args, *logger, "--trainer.max_steps=12",
                   "--trainer.log_every_n_steps=1"])  # fmt: skip
    metrics = run.trainer.callback_metrics
    assert metrics["concepts/coverage"] == 1
    assert metrics["concepts/entropy"] > 0.97
    assert Path(run.trainer.log_dir, "concepts.png").is_file()


def test_swapped_data_train_on_what_was_held_out_and_validate_on_the_training_set():
    changes = {"plain": {}, "swapped": {"swap": True}, "noisy": {"swap": True, "holdout_noise": 0.3}}
    data = {k: Images(data="digits", label_noise=0.3, holdout=0.2, **v) for k, v in changes.items()}
    for module in data.values():
        module.setup("fit")
    for name in ("swapped", "noisy"):
        for trained, validated in zip(data["plain"].train.dataset.tensors, data[name].val.tensors, strict=True):
            assert torch.equal(trained, validated)
        assert torch.equal(data[name].train.dataset.tensors[0], data["plain"].val.tensors[0])
    wrong = data["plain"].val.tensors[1] != data["noisy"].train.dataset.tensors[1]
    assert float(wrong.float().mean()) == pytest.approx(0.3, abs=0.08)
    assert torch.equal(wrong, data["noisy"].corrupted)
    assert torch.equal(data["plain"].val.tensors[1], data["swapped"].train.dataset.tensors[1])


def test_the_share_of_wrong_labels_is_that_of_the_record():
    record, data = SampleRecord(), Images(data="digits", label_noise=0.4, batch_size=64)
    run = trainer(HardSampleSelection(keep=0.25), record, CorruptedShare(), max_epochs=2)
    run.fit(ImageClassifier(), datamodule=data)
    kept = record.store.kept.double()
    expected = kept[data.corrupted].sum() / kept.sum()
    assert float(run.callback_metrics["curation/kept_corrupted"]) == pytest.approx(float(expected))
    assert float(run.callback_metrics["curation/all_corrupted"]) == pytest.approx(
        float(data.corrupted.double().mean())
    )


def test_irreducible_losses_are_those_of_the_model_by_sample_id_and_are_subtracted():
    args = ["--config", "fashion_mnist_noisy", *DIGITS, "--data.holdout=0.3"]
    held_out = ["--data.swap=true", "--trainer.callbacks.keep=1.0", "--trainer.max_steps=30"]
    checkpoints = ["--trainer.default_root_dir=held_out", "--trainer.val_check_interval=10"]
    first = cli.run(["fit", *args, *held_out, *checkpoints])
    best = first.trainer.checkpoint_callback.best_model_path
    cli.main(["irreducible", *args, f"--ckpt_path={best}", "--output=out/table.pt"])
    table = torch.load("out/table.pt")

    data = Images(data="digits", label_noise=0.4, holdout=0.3)
    data.setup("fit")
    model = ImageClassifier()
    model.net(torch.zeros(1, *data.shape))
    model.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
    x, y = data.train.dataset.tensors
    with torch.no_grad():
        torch.testing.assert_close(table, per_sample_loss(model.eval()(x), y), rtol=1e-4, atol=1e-5)

    seed_everything(1, verbose=False)
    selection = HardSampleSelection(keep=0.25, score="reducible_loss", irreducible="out/table.pt")
    record, module = SampleRecord(), ImageClassifier(lr=1e-9)
    trainer(selection, record, max_epochs=1).fit(module, datamodule=data)
    with torch.no_grad():
        torch.testing.assert_close(
            record.store.scores, per_sample_loss(module.eval()(x), y) - table, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ckpt_path=none.ckpt", "--output=t.pt"], "Argument `--ckpt_path` must name a checkpoint, .* 'none.ckpt'"),
        (["--ckpt_path=here", "--output=here"], "Argument `--output` must name a new file, but 'here' exists"),
        (["--ckpt_path=here", "--output=t.pt", "--config=unknown"], "A recipe must be one of .* but got 'unknown'"),
    ],
)
def test_irreducible_says_what_is_wrong_in_one_line(args, message, tmp_path):
    (tmp_path / "here").touch()
    with pytest.raises(SystemExit, match=f"^curation: {message}"):
        cli.main(["irreducible", *args])


def test_a_table_that_does_not_fit_is_refused_before_training(tmp_path):
    data = Images(data="digits")
    torch.save(torch.zeros(5), tmp_path / "five.pt")
    torch.save({"no": 1}, tmp_path / "other.pt")
    for file, message in [
        ("none.pt", "must name a file, but there is no 'none.pt'"),
        ("other.pt", "must name a file with one loss per sample, but 'other.pt' has not"),
        ("five.pt", r"one loss for each of the \d+ training samples, but 'five.pt' has 5"),
    ]:
        selection = HardSampleSelection(keep=0.5, score="reducible_loss", irreducible=file)
        with pytest.raises(ValueError, match=f"Argument `irreducible` .*{message}"):
            trainer(selection).fit(ImageClassifier(), datamodule=data)
    with pytest.raises(ValueError, match="Argument `irreducible` must be a file with `score='reducible_loss'`"):
        HardSampleSelection(keep=0.5, score="reducible_loss")
    with pytest.raises(ValueError, match="Argument `score` must not be negative with `rule='importance'`"):
        HardSampleSelection(keep=0.5, rule="importance", score="reducible_loss", irreducible="x")


@pytest.mark.parametrize("zipped", [False, True])
def test_files_in_the_format_of_mnist_are_read(tmp_path, zipped):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.array([3, 1], np.uint8))):
            content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            name = f"{part}-{kind}-ubyte"
            (tmp_path / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)
    x, y, test_x, test_y = load_images(str(tmp_path))
    torch.testing.assert_close(x[:, 0] * 255, torch.from_numpy(images).float())
    assert y.tolist() == test_y.tolist() == [3, 1]
    assert torch.equal(x, test_x)
    file = next(f for f in tmp_path.iterdir() if f.name.startswith("train-images"))
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"not an array", b"", b"\x01" + whole[1:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"The file .*train-images-idx3-ubyte.* is damaged, or another"):
            load_images(str(tmp_path))


def test_bad_data_arguments_are_named(tmp_path):
    for bad in (
        {"label_noise": 1.0},
        {"holdout_noise": -0.1},
        {"holdout": 0.0},
        {"batch_size": 0},
        {"seed": -1},
        {"imbalance": 0.5},
        {"rarest": 0},
    ):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"Argument `{name}` must be .* but got {value}"):
            Images(**bad)
    with pytest.raises(ValueError, match=r"Argument `lr` must be in \(0, inf\), but got 0"):
        ImageClassifier(lr=0)
    with pytest.raises(ValueError, match=r"a folder with train-images-idx3-ubyte\.gz, but got"):
        load_images(str(tmp_path))


def test_uniform_selection_keeps_wrong_labels_at_their_rate():
    run = trainer(UniformSelection(keep=0.25), CorruptedShare(), max_epochs=8)
    run.fit(ImageClassifier(), datamodule=Images(data="digits", label_noise=0.4, batch_size=64))
    shares = [float(run.callback_metrics[f"curation/{name}_corrupted"]) for name in ("kept", "all")]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_the_share_of_wrong_labels_goes_on_after_a_resume(tmp_path):
    def fit(steps, **kwargs):
        shares = CorruptedShare()
        save = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        callbacks = [UniformSelection(keep=0.5), shares, save]
        run = trainer(*callbacks, max_steps=steps, max_epochs=-1, enable_checkpointing=True)
        run.fit(ImageClassifier(), datamodule=Images(data="digits", label_noise=0.4, batch_size=64), **kwargs)
        return shares._sums.tolist()

    fit(3)
    _, kept, _, seen = fit(6, ckpt_path=tmp_path / "last.ckpt")
    assert (kept, seen) == (6 * 32, 6 * 64)


def test_irreducible_losses_are_by_id_where_the_loader_shows_a_part_in_another_order(tmp_path):
    class Part(Images):
        def train_dataloader(self):
            return DataLoader(Subset(self.train, [5, 900, 3]), 2)

    module, data = ImageClassifier(), Part(data="digits")
    data.setup("fit")
    module.net(torch.zeros(1, *data.shape))
    run = trainer()
    run.strategy.connect(module)
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "m.ckpt")
    table = irreducible_losses(run, module, data, str(tmp_path / "m.ckpt"))
    x, y = data.train.dataset.tensors
    with torch.no_grad():
        expected = per_sample_loss(module.eval()(x), y)
    assert len(table) == 901
    assert table.isnan().sum() == 898
    torch.testing.assert_close(table[[5, 900, 3]], expected[[5, 900, 3]])


def test_training_images_are_shifted_and_mirrored():
    x = torch.rand(2000, 1, 4, 5)
    assert varied(x, 0, mirror=False) is x
    mirrored = varied(x, 0, mirror=True)
    flipped = (mirrored == x.flip(3)).flatten(1).all(1)
    assert ((mirrored == x).flatten(1).all(1) | flipped).all()
    assert 900 < int(flipped.sum()) < 1100
    moved = varied(x, 1, mirror=False)
    padded = torch.nn.functional.pad(x, (1,) * 4, mode="replicate")
    places = [(moved == padded[:, :, r : r + 4, c : c + 5]).flatten(1).all(1) for r in range(3) for c in range(3)]
    assert torch.stack(places).any(0).all()
    assert all(150 < int(place.sum()) < 300 for place in places)


def test_the_linear_schedule_rises_and_falls_to_zero():
    run = cli.run(
        ["fit", "--config=fashion_mnist_pruning", *DIGITS, "--trainer.max_epochs=4", "--trainer.limit_val_batches=0"]
    )
    optimizer = run.trainer.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == 0
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.004)


def test_a_schedule_to_the_end_of_a_fit_without_an_end_is_refused():
    """The rate would be 0."""
    run = trainer(max_epochs=-1, max_time={"seconds": 1})
    with pytest.raises(ValueError, match="`schedule` must be 'constant' in a fit without `max_epochs` or"):
        run.fit(ImageClassifier(schedule="linear"), Images(data="digits", batch_size=64))


# ---------------------------------------------------------------------- other losses


def rows(n=12):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def classifier(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ImageClassifier(**options)
        module.net(torch.zeros(1, 1, 8, 8))
    return module


def written_out(module, x, y, weights, smoothing, gamma):
    """The losses by their formula, one row after the other, in double precision."""
    losses = []
    for logits, target in zip(module(x).double(), y.tolist(), strict=True):
        p = logits.exp() / logits.exp().sum()
        share = torch.full((10,), smoothing / 10, dtype=torch.float64)
        share[target] += 1 - smoothing
        losses.append((1 - p[target]) ** gamma * -(weights * share * p.log()).sum())
    return torch.stack(losses)


WEIGHTS = [0.5 + c / 3 for c in range(10)]
LOSSES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "weighted": {"class_weights": WEIGHTS},
    "focal": {"focal_gamma": 2.0},
    "root": {"focal_gamma": 0.5},
    "all": {"class_weights": WEIGHTS, "label_smoothing": 0.2, "focal_gamma": 1.5},
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_training_loss_and_its_gradient_are_those_of_the_formula(kind, monkeypatch):
    module, (x, y) = classifier(**LOSSES[kind]), rows()
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    weights = torch.tensor(LOSSES[kind].get("class_weights", [1.0] * 10), dtype=torch.float64)
    gamma = LOSSES[kind].get("focal_gamma", 0.0)
    losses = written_out(module, x, y, weights, LOSSES[kind].get("label_smoothing", 0.0), gamma)
    expected = losses.mean() if gamma or kind == "plain" else losses.sum() / weights[y].sum()
    loss = module.training_step([x, y], 0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    parameters = list(module.net.parameters())
    for got, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_row_that_is_surely_right_has_no_gradient_and_no_nan():
    module, (x, y) = classifier(focal_gamma=0.5), rows()
    module.net[-1].bias.data[int(y[0])] = 200.0
    module._focal_losses((x[:1], y[:1])).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.net.parameters())


@pytest.mark.parametrize("kind", LOSSES)
def test_selections_score_by_the_losses_that_are_trained_on(kind, recwarn):
    module, (x, y) = classifier(**LOSSES[kind]), rows()
    weights = torch.tensor(LOSSES[kind].get("class_weights", [1.0] * 10), dtype=torch.float64)
    expected = written_out(
        module, x, y, weights, LOSSES[kind].get("label_smoothing", 0.0), LOSSES[kind].get("focal_gamma", 0.0)
    )
    seen = []

    class Watched(HardSampleSelection):
        def score(self, *args):
            seen.append(super().score(*args))
            return seen[-1]

    selection = Watched(keep=0.5)
    trainer(selection, max_epochs=1).fit(module, DataLoader(list(zip(x, y, strict=True)), 12))
    torch.testing.assert_close(seen[0].double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert ("score_step" in selection.describe()) == ("focal_gamma" in LOSSES[kind])
    assert not [w for w in recwarn if "which is scored" in str(w.message)]


def test_losses_of_training_and_weights_of_rows_reach_a_focal_loss():
    module, (x, y) = classifier(focal_gamma=2.0), rows()
    before = written_out(module, x, y, torch.ones(10), 0.0, 2.0).detach()
    data = list(zip(x, y, strict=True))
    sampler = DynamicDataPruningSampler(data, batch_size=12)
    module.hparams["lr"] = 1e-12
    pruning = DynamicDataPruning()
    trainer(pruning, max_epochs=1).fit(module, DataLoader(data, 12, sampler=sampler))
    torch.testing.assert_close(sampler.losses.double(), before, rtol=1e-4, atol=1e-5)
    weighted = classifier(focal_gamma=2.0)
    importance = HardSampleSelection(keep=0.5, rule="importance", score="loss")
    trainer(importance, max_epochs=1).fit(weighted, DataLoader(data, 12))
    assert importance.samples_trained == 6


def test_class_weights_are_those_of_the_training_labels_and_of_the_checkpoint(tmp_path):
    save, data = ModelCheckpoint(tmp_path, save_last=True), Images(data="digits", imbalance=10, batch_size=64)
    module = ImageClassifier(class_weights=True)
    trainer(save, max_epochs=1, enable_checkpointing=True).fit(module, data)
    counts = data.train.dataset.tensors[1].bincount().double()
    torch.testing.assert_close(module.criterion.weight.double(), counts.sum() / (10 * counts))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(state["state_dict"]["criterion.weight"], module.criterion.weight)
    loaded = ImageClassifier(**state["hyper_parameters"])
    trainer().test(loaded, Images(data="digits"), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(loaded.criterion.weight, module.criterion.weight)
    with pytest.raises(ValueError, match=r"`class_weights` must be a list of 10 numbers or False where .* got True"):
        trainer().fit(classifier(class_weights=True), DataLoader(list(zip(*rows(), strict=True)), 4))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_weights", [1.0] * 9),
        ("class_weights", "yes"),
        ("label_smoothing", 1.0),
        ("label_smoothing", True),
        ("focal_gamma", -0.1),
        ("focal_gamma", None),
    ],
)
def test_bad_settings_of_the_loss_are_named(name, value):
    with pytest.raises(ValueError, match=f"^Argument `{name}` must be .* but got {re.escape(repr(value))}"):
        ImageClassifier(**{name: value})


def test_a_class_without_weight_is_named():
    with pytest.raises(ValueError, match=r"Argument `class_weights` must be in \(0, inf\), but got 0.0"):
        ImageClassifier(class_weights=[0.0, *WEIGHTS[1:]])


def test_arms_of_other_losses_run_where_they_are_asked_for():
    found = {}
    for name, arms in {
        "fashion_mnist_noisy": ["label_smoothing"],
        "fashion_mnist_long_tail": ["class_weights", "focal"],
    }.items():
        args = [f"--config={find_recipe(name)}"]
        recipe = resolve(args)
        assert not set(arms) & set(arm_names(name, recipe, [], None))
        assert set(arms) < set(arm_names(name, recipe, [], arms))
        for arm in arms:
            found[arm] = configure(args, make_arm(arm, recipe, 0.1), 3, None, Path("out"), "", {})
    noisy, weighted, focal = (
        found[arm]["model"]["init_args"] for arm in ("label_smoothing", "class_weights", "focal")
    )
    assert (noisy["label_smoothing"], weighted["class_weights"], focal["focal_gamma"]) == (0.1, True, 2.0)
    assert [found[arm]["data"]["init_args"]["sampler"] for arm in ("class_weights", "focal")] == [None, None]
    (selection,) = (c for c in found["label_smoothing"]["trainer"]["callbacks"] if "Selection" in c["class_path"])
    assert selection["class_path"].endswith(".UniformSelection")
    assert selection["init_args"]["keep"] == 0.1
