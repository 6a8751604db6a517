import json

import pytest
import torch
from helpers import Classifier, data, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from curation.callbacks import HardSampleSelection, SampleTable
from curation.sample_ids import SampleIds


class Fields(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        x, y = data()[i]
        return {"x": x, "y": y, "text": f"sample {i}"}


class OfFields(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def fit(tmp_path, table, *callbacks, module=OfFields, samples=None):
    logger = WandbLogger(project="table", save_dir=tmp_path, offline=True)
    batches = DataLoader(SampleIds(samples or Fields()), 8)
    try:
        trainer(HardSampleSelection(keep=0.25), table, *callbacks, logger=logger, max_epochs=1).fit(module(), batches)
    finally:
        logger.experiment.finish()
    (file,) = tmp_path.rglob("curation/shown*.table.json")
    return json.loads(file.read_text())


def test_shows_a_field_of_kept_and_left_out_samples(tmp_path):
    table = fit(tmp_path, SampleTable(show="text", rows=10))
    assert table["columns"] == ["step", "sample_id", "score", "kept", "text"]
    assert [row[4] for row in table["data"]] == [f"sample {row[1]}" for row in table["data"]]
    assert [sum(row[3] is kept for row in table["data"]) for kept in (True, False)] == [5, 5]
    assert all(row[2] > 0 for row in table["data"])


def test_shows_what_a_function_gives_and_images(tmp_path):
    show = lambda sample: {"image": sample["x"].view(1, 2, 4), "label": sample["y"], "list": [1, 2]}  # noqa: E731
    table = fit(tmp_path, SampleTable(show=show))
    assert table["columns"][4:] == ["image", "label", "list"]
    assert table["data"][0][4] == "Image"  # the picture itself is in the artifact
    assert table["data"][0][5] == int(data()[table["data"][0][1]][1])
    assert table["data"][0][6] == "[1, 2]"


def test_is_written_where_the_fit_fails(tmp_path):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("stop")

    table = []
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, SampleTable(show=lambda sample: sample["text"]), Fails())
    (file,) = tmp_path.rglob("curation/shown*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"][4:] == ["sample"]
    assert {row[0] for row in table["data"]} == {0, 1, 2}


def test_what_cannot_be_shown_is_said_at_the_first_batch(tmp_path):
    with pytest.raises(TypeError, match="must name a field of the samples, x, y, text, but got 'name'"):
        fit(tmp_path, SampleTable(show="name"))
    with pytest.raises(TypeError, match="of the samples, tuple, but got 'x'"):
        fit(tmp_path, SampleTable(show="x"), module=Classifier, samples=data())
    run = trainer(HardSampleSelection(keep=0.25), SampleTable(show="x"))
    with pytest.raises(TypeError, match="needs sample ids"):
        run.fit(Classifier(), loader(ids=False))
