"""Text by domain: what is read, held out and drawn, and a mixture of experts that learns from it."""

import gzip
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import trainer

from curation.callbacks import GlobalBatchLoadBalancing
from curation.recipes import cli
from curation.recipes.mixture_of_experts.domains import Domains, DomainSampler, cut, read
from curation.recipes.mixture_of_experts.expert_picture import ExpertPicture
from curation.recipes.mixture_of_experts.mixture_lm import MixtureLM

pytest.importorskip("transformers", reason="needs transformers, from the [recipes] extra")

WORDS = {"letters": "abcdefgh", "digits": "01234567"}


@pytest.fixture
def folders(tmp_path):
    """Two domains of 20 files each, half of them packed, of their own characters."""
    draw = np.random.default_rng(0)
    for name, characters in WORDS.items():
        (tmp_path / name).mkdir()
        for i in range(20):
            content = "".join(draw.choice(list(characters), draw.integers(150, 250))).encode()
            if i % 2:
                (tmp_path / name / f"{i}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / name / f"{i}.txt").write_bytes(content)
    return {name: str(tmp_path / name) for name in WORDS}


def made(domains, **options):
    data = Domains(domains, **{"length": 16, "batch_size": 4, "val_pieces": 8, **options})
    data.setup("fit")
    return data


def drawn(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def characters(rows):
    return {chr(byte) for byte in rows.flatten().tolist()}


def test_every_file_is_read_once_whatever_it_is_called(tmp_path):
    nested = tmp_path / "man" / "man1"
    nested.mkdir(parents=True)
    (nested / "a.1").write_bytes(b"one")
    (nested / "b.1.gz").write_bytes(gzip.compress(b"two"))
    (nested / "c.1").symlink_to(nested / "a.1")
    (nested / "d.1").write_bytes(b"two")
    (nested / "broken").symlink_to(nested / "nowhere")
    for source in (tmp_path / "man", tmp_path / "man/man[1-8]", nested / "*", tmp_path / "**/*.1*"):
        assert sorted(read(str(source))) == [b"one", b"two"]
    assert read(str(nested / "*.gz")) == [b"two"]
    assert read(str(tmp_path / "other")) == read("package:no_such_package/*") == []


def test_a_module_stands_for_its_folder():
    assert Path(torch.__file__).read_bytes() in read("package:torch/__init__.py")
    assert any(b"class ArgumentParser" in content for content in read("package:argparse/argparse.py"))


def test_whole_files_are_held_out_and_domains_are_equal_in_validation(folders):
    data = made(folders, holdout=0.25)
    assert data.names == ["letters", "digits"]
    assert data.val.sizes == [8, 8]
    held = dict.fromkeys(WORDS, "")
    for sample in data.val:
        held[data.names[sample["domain"]]] += bytes(sample["input_ids"].tolist()).decode()
    for d, name in enumerate(data.names):
        files = read(folders[name])
        trained = data.train.x[data.train.domain == d]
        assert torch.equal(trained, cut(files[5:], 16))
        assert characters(trained) == set(WORDS[name])
        text = b"".join(files[:5]).decode()
        pieces = [text[i : i + 16] for i in range(0, len(text) - 15, 16)]
        chosen = [held[name][i : i + 16] for i in range(0, 128, 16)]
        assert set(chosen) <= set(pieces)
        assert chosen[0] == pieces[0]
        assert chosen[-1] in pieces[-len(pieces) // 8 - 1 :]  # from all of the text
        assert len(set(chosen)) == 8
    assert torch.equal(made(folders, holdout=0.25, seed=7).val.x, data.val.x)


def test_a_micro_batch_is_of_one_domain_or_of_any(folders):
    single, mixed = (drawn(made(folders, single_domain=flag, seed=0)) for flag in (True, False))
    for batches in (single, mixed):
        assert len(batches) == sum(made(folders).train.sizes) // 4 > 50
        for batch in batches:
            assert batch["input_ids"].dtype == batch["domain"].dtype == torch.int64
            assert batch["input_ids"].shape == (4, 16)
            for row, domain in zip(batch["input_ids"], batch["domain"], strict=True):
                assert characters(row) <= set(WORDS[list(WORDS)[domain]])
    assert all(len(batch["domain"].unique()) == 1 for batch in single)
    assert {int(batch["domain"][0]) for batch in single} == {0, 1}
    alike = np.mean([len(batch["domain"].unique()) == 1 for batch in mixed])
    assert alike == pytest.approx(1 / 8, abs=0.1)  # of four that are drawn alone


@pytest.mark.parametrize("single_domain", [True, False])
def test_a_small_domain_is_drawn_as_often_as_a_large_one_and_all_of_it(single_domain):
    sampler = DomainSampler([10, 1000], 5, single_domain, seed=0)
    found = np.array([i for epoch in range(20) for i in (sampler.set_epoch(epoch), *sampler)[1:]])
    assert len(found) == 20 * len(sampler) == 20 * 1010
    assert np.mean(found < 10) == pytest.approx(0.5, abs=0.04)  # 4,040 batches: 5 deviations
    assert set(found) >= set(range(10))
    assert found.max() > 1000


def test_seed_epoch_and_process_decide_what_is_drawn(folders, monkeypatch):
    def rows(data, epoch=0):
        return torch.stack([batch["input_ids"] for batch in drawn(data, epoch)])

    first = rows(made(folders, seed=1))
    assert torch.equal(rows(made(folders, seed=1)), first)
    assert not torch.equal(rows(made(folders, seed=2)), first)
    assert not torch.equal(rows(made(folders, seed=1), epoch=1), first)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert torch.equal(rows(made(folders)), first)
    monkeypatch.setattr(DomainSampler, "_place", (1, 2))
    other = rows(made(folders, seed=1))
    assert len(other) == len(first) // 2
    assert not torch.equal(other, first[: len(other)])


def test_domains_that_are_not_there_are_left_out_with_a_warning(folders, tmp_path):
    (tmp_path / "one").write_bytes(b"x" * 1000)
    with pytest.warns(UserWarning, match=r"left out, .*: here \(1 files, 62 held-out pieces\), gone \(0 files, 0 "):
        data = made({"here": str(tmp_path / "one"), "gone": str(tmp_path / "gone"), **folders})
    assert data.names == ["letters", "digits"]
    assert data.train.domain.unique().tolist() == [0, 1]
    few = r"`domains` must name at least two .*`val_pieces` \(8\).* too few in gone \(0 files, 0 held-out pieces\)"
    with pytest.raises(ValueError, match=few):
        made({"letters": folders["letters"], "gone": str(tmp_path / "gone")})
    with pytest.raises(ValueError, match=r"must name at least two .* too few in letters .* digits "):
        made(folders, val_pieces=1000)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"length": 1}, "`length` must be an integer >= 2, but got 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, but got 0"),
        ({"val_pieces": 0}, "`val_pieces` must be an integer >= 1, but got 0"),
        ({"holdout": 1.0}, r"`holdout` must be in \(0, 1\), but got 1.0"),
        ({"seed": -1}, r"`seed` must be an integer in \[0, 2\^63\) or None, but got -1"),
        ({"length": 16.0}, "`length` must be an integer >= 2, but got 16.0"),
        ({"single_domain": 1}, "`single_domain` must be True or False, but got 1"),
        ({"num_workers": "2"}, "`num_workers` must be an integer >= 0, but got '2'"),
        ({"holdout": True}, r"`holdout` must be in \(0, 1\), but got True"),
    ],
)
def test_arguments_of_the_data_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=f"Argument {message}"):
        Domains({}, **bad)


# ---------------------------------------------------------------------- the model

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "experts": 4, "top_k": 2, "expert_hidden": 8}


def fit(module, data, *callbacks, **options):
    options = {"max_epochs": -1, "max_steps": 3, "accumulate_grad_batches": 4, "num_sanity_val_steps": 0, **options}
    torch.manual_seed(0)
    run = trainer(*callbacks, **{"val_check_interval": 12, "check_val_every_n_epoch": None, **options})
    run.fit(module, datamodule=data)
    return run


def test_it_learns_to_tell_domains_apart_under_a_balance_of_the_whole_update(folders):
    torch.manual_seed(0)
    module, data = MixtureLM(**SMALL, lr=3e-2, warmup_steps=2), made(folders, seed=0)
    balance = GlobalBatchLoadBalancing(0.01)
    run = fit(module, data, balance, max_steps=40)
    assert float(run.callback_metrics["experts/max_load"]) >= 1
    assert run.optimizers[0].param_groups[0]["lr"] == 0
    found = trainer().validate(module, data, verbose=False)[0]
    assert math.log(8) - 0.05 < found["val_loss"] < math.log(16) - 0.2  # 16 characters in all, 8 in a piece


def test_what_validation_logs_is_that_of_all_held_out_bytes(folders):
    torch.manual_seed(0)
    module, data = MixtureLM(**SMALL), made(folders, holdout=0.5, val_pieces=70)  # several batches
    found = trainer().validate(module, data, verbose=False)[0]
    x, domains = data.val.x.long(), data.val.domain.repeat_interleave(16)
    indices = []
    for layer in module.model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *call: indices.append(call[-1][2]))
    with torch.no_grad():
        loss = F.cross_entropy(module.model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert found["val_loss"] == pytest.approx(float(loss), abs=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    information, load = [], []
    for chosen in indices:
        joint = torch.stack([torch.bincount(chosen[domains == d].flatten(), minlength=4) for d in (0, 1)]).double()
        joint = joint / joint.sum()
        alone = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        information.append(float((joint * (joint / alone).log2()).nansum()))
        load.append(float(4 * joint.sum(0).max()))
    assert found["val_domain_information"] == pytest.approx(sum(information) / 2, abs=1e-5)
    assert found["val_max_load"] == pytest.approx(sum(load) / 2, abs=1e-5)


def test_nothing_listens_to_the_routers_after_a_validation(folders):
    module = MixtureLM(**SMALL)
    fit(module, made(folders))
    assert not any(m._forward_hooks for m in module.modules())
    module.loss = None  # it fails
    with pytest.raises(TypeError):
        module.validation_step({"input_ids": torch.zeros(1, 8, dtype=torch.int64), "domain": torch.zeros(1)}, 0)
    assert not any(m._forward_hooks for m in module.modules())


def test_the_learning_rate_rises_and_falls_to_the_last_step(folders):
    module = MixtureLM(**SMALL, lr=1.0, warmup_steps=2)
    run = fit(module, made(folders), max_steps=6)
    rate = run.lr_scheduler_configs[0].scheduler.lr_lambdas[0]
    assert [round(rate(step), 3) for step in range(7)] == [0.333, 0.667, 1, 0.854, 0.5, 0.146, 0]


def test_it_comes_back_from_its_checkpoint(folders, tmp_path):
    torch.manual_seed(0)
    module, data = MixtureLM(**SMALL), made(folders)
    run = fit(module, data)
    run.save_checkpoint(tmp_path / "mixture.ckpt")
    again = MixtureLM.load_from_checkpoint(tmp_path / "mixture.ckpt")
    found = trainer().validate(again, data, verbose=False)[0]
    assert found["val_loss"] == pytest.approx(float(run.callback_metrics["val_loss"]), abs=1e-6)


def test_the_packaged_recipe_runs(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = cli.run(
        [
            "fit",
            "--config=load_balancing",
            f"--data.domains={json.dumps(folders)}",
            "--data.length=16",
            "--data.val_pieces=8",
            "--model.hidden=16",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=16",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
    )
    assert run.trainer.global_step == 2
    assert run.datamodule.names == ["letters", "digits"]
    assert run.trainer.callback_metrics["val_max_load"] >= 1
    assert run.trainer.callback_metrics["experts/max_load"] >= 1
    image = matplotlib.image.imread("runs/load_balancing.png")
    assert image.shape[1] > image.shape[0] > 300
    assert image.std() > 0.05
    (pictured,) = (c for c in run.trainer.callbacks if isinstance(c, ExpertPicture))
    assert pictured.frequencies.shape == (4, 2, 16)
    torch.testing.assert_close(pictured.frequencies.sum(-1), torch.ones(4, 2))


def test_data_without_domains_are_refused():
    with pytest.raises(TypeError, match="MixtureLM needs a data module with `names` of domains"):
        trainer().validate(MixtureLM(**SMALL), [0], verbose=False)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": 0.0}, r"`lr` must be in \(0, inf\), but got 0.0"),
        ({"warmup_steps": -1}, "`warmup_steps` must be an integer >= 0, but got -1"),
        ({"top_k": 17}, r"`top_k` must be in \[1, experts = 16\], but got 17"),
        ({"top_k": 0}, "`top_k` must be an integer >= 1, but got 0"),
        ({"experts": 4.0}, "`experts` must be an integer >= 1, but got 4.0"),
        ({"weight_decay": "x"}, r"`weight_decay` must be in \[0, inf\), but got 'x'"),
        ({"hidden": 60}, "`hidden` must be a multiple of 8, 2 heads, but got 60"),
    ],
)
def test_arguments_of_the_model_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=f"Argument {message}"):
        MixtureLM(**bad)
