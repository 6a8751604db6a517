"""A pool of text, what each arm keeps of it, and the losses on the target and elsewhere."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import trainer

from curation.recipes import cli
from curation.recipes.targeted import ByteConvolutions, TargetTexts
from curation.recipes.targeted.target_texts import byte_features

WORDS = {"letters": "abcd", "digits": "0123"}
SMALL = {"pool": 30, "examples": 6, "length": 16, "batch_size": 4, "val_pieces": 8, "seed": 0}


@pytest.fixture
def folders(tmp_path):
    """Two domains of 20 files each, of their own characters."""
    draw = np.random.default_rng(0)
    for name, characters in WORDS.items():
        (tmp_path / name).mkdir()
        for i in range(20):
            content = "".join(draw.choice(list(characters), 200))
            (tmp_path / name / f"{i}.txt").write_text(content)
    return {name: str(tmp_path / name) for name in WORDS}


def made(folders, **options):
    data = TargetTexts(folders, **{"target": "digits", **SMALL, **options})
    data.setup("fit")
    return data


def rows(data):
    return {tuple(x) for x in data.train.x.tolist()}


def test_a_target_brings_its_domain_and_random_rows_bring_all(folders):
    whole = made(folders, keep="all")
    assert whole.train.sizes == [30, 30]
    assert made(folders, keep="best_rank", budget=0.25).train.sizes == [0, 15]
    assert made(folders, keep="best_rank", budget=0.25, agree=3).train.sizes == [0, 15]
    assert made(folders, keep="centroid", budget=0.25).train.sizes == [0, 15]
    drawn = made(folders, keep="random", budget=0.25)
    assert len(drawn.train) == 15
    assert min(drawn.train.sizes) > 0
    assert rows(drawn) <= rows(whole)


def test_random_rows_of_the_same_domains_are_as_many_and_others(folders):
    chosen, drawn = (made(folders, keep=keep, budget=0.6) for keep in ("best_rank", "same_domains"))
    assert chosen.train.sizes == drawn.train.sizes
    assert rows(chosen) != rows(drawn)
    assert rows(drawn) <= rows(made(folders, keep="all"))


def test_the_seed_draws_pool_and_examples(folders):
    assert rows(made(folders)) == rows(made(folders))
    assert rows(made(folders, keep="all")) != rows(made(folders, keep="all", seed=1))


def test_batches_say_what_is_of_the_target(folders):
    data = made(folders, keep="all")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = list(loader)
        domain, of_target = (torch.cat([batch[key] for batch in batches]) for key in ("domain", "is_target"))
        assert of_target.tolist() == (domain == data.names.index("digits")).tolist()
        assert 0 < of_target.sum() < len(of_target)


def test_it_begins_broad_and_ends_narrow(folders):
    data, seen = made(folders, begin=1.0, budget=0.1), []

    class Watched(ByteConvolutions):
        def training_step(self, batch, batch_idx):
            seen.append(batch["is_target"])
            return super().training_step(batch, batch_idx)

    trainer(max_steps=30, max_epochs=-1).fit(Watched(hidden=8, layers=1), data)
    assert len(seen) == 30
    assert torch.cat(seen[:8]).float().mean() < 0.8
    assert torch.cat(seen[-8:]).all()


def test_a_beginning_needs_steps(folders):
    with pytest.raises(ValueError, match="`begin` needs a trainer with `max_steps`"):
        made(folders, begin=1.0).train_dataloader()


def test_features_are_those_counted_one_by_one():
    pieces = torch.randint(97, 101, (20, 12), generator=torch.Generator().manual_seed(0)).byte()
    features = byte_features(pieces, size=1 << 20)  # without collisions
    texts = [bytes(piece.tolist()) for piece in pieces]
    grams = [[text[i : i + 3] for i in range(10)] for text in texts]
    vectors = []
    for row in grams:
        vector = {g: math.log(1 + row.count(g)) * math.log(20 / sum(g in other for other in grams)) for g in row}
        length = math.sqrt(sum(value**2 for value in vector.values()))
        vectors.append({g: value / length for g, value in vector.items()})
    means = {g: sum(v.get(g, 0) for v in vectors) / 20 for v in vectors for g in v}
    for i in range(20):
        for j in range(20):
            expected = sum((vectors[i].get(g, 0) - mean) * (vectors[j].get(g, 0) - mean) for g, mean in means.items())
            assert features[i] @ features[j] == pytest.approx(expected, abs=1e-5)


def test_a_byte_does_not_see_what_comes_after_it():
    module, x = ByteConvolutions(hidden=8, layers=3), torch.randint(256, (2, 20))
    other = torch.cat([x[:, :12], torch.randint(256, (2, 8))], 1)
    torch.testing.assert_close(module(x)[:, :12], module(other)[:, :12])
    far = torch.cat([x[:, :1] ^ 1, x[:, 1:]], 1)  # 2^4 - 1 bytes are seen
    changed = (module(x) - module(far)).abs().amax((0, 2)) > 0
    assert changed.tolist() == [True] * 15 + [False] * 5


def test_both_losses_are_those_of_their_rows(folders):
    data, module = made(folders, keep="all"), ByteConvolutions(hidden=8, layers=2)
    logged = trainer().validate(module, data, verbose=False)[0]
    for name, domain in (("val_loss", 1), ("val_other_loss", 0)):
        x = torch.stack([piece["input_ids"] for piece in data.val_set if piece["domain"] == domain])
        with torch.no_grad():
            expected = F.cross_entropy(module(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        assert logged[name] == pytest.approx(float(expected), abs=1e-5)


def test_the_packaged_recipe_runs(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = cli.run(
        [
            "fit",
            "--config=targeted_text",
            f"--data.domains={json.dumps(folders)}",
            "--data.target=letters",
            *(f"--data.{name}={value}" for name, value in SMALL.items()),
            "--data.agree=2",
            "--model.hidden=16",
            "--trainer.max_steps=12",
            "--trainer.val_check_interval=4",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
    )
    assert run.datamodule.train.sizes == [6, 0]
    losses = run.trainer.callback_metrics
    assert losses["val_loss"] < 4 < losses["val_other_loss"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"target": "runes"}, "`target` must be one of letters, digits, but got 'runes'"),
        ({"keep": "worst"}, "`keep` must be"),
        ({"budget": 0.0}, r"`budget` must be in \(0, 1\]"),
        ({"agree": 0}, "`agree` must be"),
        ({"begin": 0.05}, "`begin` must be >= `budget` and with `keep` 'best_rank', but got 0.05"),
        ({"begin": 1.0, "keep": "random"}, "`begin` must be >= `budget` and with `keep`"),
        ({"begin": 1.5}, "`begin` must be in"),
        ({"length": 2}, "`length` must be an integer >= 3"),
        ({"pool": 1000}, "`pool` and `examples` must be at most the 225 pieces of 'letters' together"),
        ({"examples": 0}, "`examples` must be"),
    ],
)
def test_arguments_out_of_range_are_refused(folders, bad, message):
    with pytest.raises(ValueError, match=message):
        made(folders, **bad)


@pytest.mark.parametrize("bad", [{"hidden": 0}, {"layers": 0}, {"lr": 0.0}, {"weight_decay": -1.0}])
def test_arguments_of_the_model_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
        ByteConvolutions(**bad)
