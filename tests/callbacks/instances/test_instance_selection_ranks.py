"""Instance selection in two processes."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Classifier, data, loader, trainer
from instance_runs import Rows, Stream, Unlabelled
from lightning.pytorch import seed_everything
from processes import on_two_ranks
from stand_ins import EverySecond, Fails, Smallest
from torch.utils.data import (
    DataLoader,
    Subset,
)

from curation.callbacks import ExactResume, InstanceSelection

RANKS = ("ddp", "fsdp2")


class Ranked(Classifier):
    """Learns nothing: a sample that fills up the last batch would make the ranks differ from one process."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Sharded(Ranked):
    """The root is sharded, so that its layers must not run without it."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net, mesh=mesh)
        fully_shard(self, mesh=mesh)


def select_on(rank_or_none, strategy):
    seed_everything(7, verbose=False)
    rows, selector = Rows(), Smallest()
    module = (Sharded if strategy == "fsdp2" else Ranked)()
    callback = InstanceSelection(selector=selector, layer="net.0", warmup_epochs=1, every_n_epochs=1)
    options = {} if rank_or_none is None else {"devices": 2, "strategy": strategy}
    if strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        options["strategy"] = ModelParallelStrategy(2, 1)
    size = 16 if rank_or_none is None else 8
    run = trainer(callback, ExactResume(), rows, max_epochs=3, **options)
    run.fit(module, DataLoader(Subset(data(), range(63)), size, shuffle=True))
    return {"epochs": rows.epochs, "given": selector.given, "state": callback.state_dict()}


def main(folder):
    """One of two processes."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for strategy in RANKS:
        torch.save(select_on(rank, strategy), Path(folder, f"{strategy}-{rank}.pt"))
    errors = {}
    for name, callback, options in (
        ("selector", InstanceSelection(selector=Fails()), {}),
        ("sampler", InstanceSelection(selector=EverySecond()), {"use_distributed_sampler": False}),
        ("stream", InstanceSelection(selector=EverySecond()), {}),
    ):
        run = trainer(callback, devices=2, strategy="ddp", **options)
        try:
            run.fit(Ranked(), DataLoader(Stream(), 8) if name == "stream" else loader(ids=False))
        except (ArithmeticError, RuntimeError, TypeError) as error:
            errors[name] = repr(error)

    class Labels(Unlabelled):
        """Only the second process meets a bad label."""

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch if rank == 0 else (batch[0], batch[1].float())

    try:
        trainer(InstanceSelection(selector=EverySecond()), devices=2, strategy="ddp").fit(Labels(), loader(ids=False))
    except (RuntimeError, TypeError) as error:
        errors["pass"] = repr(error)
    torch.save(errors, Path(folder, f"errors-{rank}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(__file__, folder)
    return folder


@pytest.mark.parametrize("strategy", RANKS)
def test_two_ranks_select_and_train_as_one_process(ranks, strategy):
    first, second = (torch.load(ranks / f"{strategy}-{rank}.pt", weights_only=False) for rank in (0, 1))
    expected = select_on(None, "auto")
    assert len(first["given"]) == 2
    assert second["given"] == []  # only the first process selects
    for (features, labels), (whole, same) in zip(first["given"], expected["given"], strict=True):
        np.testing.assert_allclose(features, whole, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(labels, same)
    assert repr(first["state"]) == repr(second["state"])
    for key in ("indices", "selected_for", "samples"):
        assert repr(first["state"][key]) == repr(expected["state"][key])
    assert [len(epoch) for epoch in first["epochs"]] == [32, 8, 8]  # of 63 and 15
    for even, odd, whole in zip(first["epochs"], second["epochs"], expected["epochs"], strict=True):
        both = [i for pair in zip(even, odd, strict=True) for i in pair]
        assert both == [*whole, whole[0]]


def test_an_error_on_one_rank_is_raised_on_all(ranks):
    first, second = (torch.load(ranks / f"errors-{rank}.pt") for rank in (0, 1))
    elsewhere = "Another process failed at the same point"
    assert "ArithmeticError('no selection')" in first["selector"]
    assert elsewhere in second["selector"]
    assert elsewhere in first["pass"]
    assert "the labels of a" in second["pass"]
    for errors in (first, second):
        assert "divided between all 2 processes" in errors["sampler"]
        assert "but not of Stream" in errors["stream"]


if __name__ == "__main__":
    main(sys.argv[1])
