"""What is written to W&B and TensorBoard, and to no other logger."""

from types import SimpleNamespace

import pytest
from helpers import Classifier, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from curation.callbacks.lightning.loggers import log_histogram, log_image, log_table, takes_histograms, takes_media

VALUES = [0.0, 0.0, 1.0, 4.0]


class Logs(Callback):
    def __init__(self, picture) -> None:
        self.picture = picture

    def on_train_batch_end(self, trainer, *_):
        log_histogram(trainer, "room/values", VALUES)
        log_histogram(trainer, "room/nothing", [])

    def on_train_end(self, trainer, *_):
        log_table(trainer, "room/table", ["a", "b"], [[1, "x"], [2, "y"]])
        log_table(trainer, "room/empty", ["a"], [])
        for name, image in (("file", self.picture), ("figure", Figure())):
            log_image(trainer, f"room/{name}", image)


@pytest.fixture
def picture(tmp_path):
    Figure((1, 1)).savefig(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def fit(logger, picture):
    trainer(Logs(picture), logger=logger, max_epochs=1, log_every_n_steps=2).fit(Classifier(), loader(ids=False))


def test_weights_and_biases_gets_histograms_tables_and_pictures(tmp_path, picture):
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(logger, picture)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["room/values"]["_type"] == "histogram"
    assert sum(summary["room/values"]["values"]) == len(VALUES)
    assert (summary["room/table"]["_type"], summary["room/table"]["nrows"]) == ("table-file", 2)
    assert {"room/file", "room/figure"} <= summary.keys()
    assert not {"room/nothing", "room/empty"} & summary.keys()


def test_tensorboard_gets_histograms_at_the_steps_of_other_metrics(tmp_path, picture):
    logger = TensorBoardLogger(tmp_path)
    fit(logger, picture)
    events = EventAccumulator(logger.log_dir, {"scalars": 0, "histograms": 0}).Reload()
    histograms = events.Histograms("room/values")
    assert [event.step for event in histograms] == list(range(8))
    assert {event.step for event in events.Scalars("train_loss")} <= {event.step for event in histograms}
    assert (histograms[0].histogram_value.num, histograms[0].histogram_value.max) == (4, 4.0)
    assert events.Tags()["histograms"] == ["room/values"]


def test_other_loggers_get_none_of_them(tmp_path, picture):
    logger = CSVLogger(tmp_path)
    fit(logger, picture)
    assert "room" not in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


@pytest.mark.parametrize(
    ("logger", "histograms", "media"),
    [
        (CSVLogger, False, False),
        (TensorBoardLogger, True, False),
        (lambda folder: WandbLogger(project="test", save_dir=folder, offline=True), True, True),
    ],
    ids=["csv", "tensorboard", "wandb"],
)
def test_what_a_logger_takes_is_known_and_only_the_first_rank_writes(tmp_path, logger, histograms, media):
    run = trainer(logger=logger(tmp_path))
    assert (takes_histograms(run), takes_media(run)) == (histograms, media)
    other_rank = SimpleNamespace(is_global_zero=False, loggers=run.loggers)
    assert not takes_histograms(other_rank)
    assert not takes_media(other_rank)
    log_histogram(other_rank, "room/values", VALUES)
    log_table(other_rank, "room/table", ["a"], [[1]])
    log_image(other_rank, "room/figure", Figure())
    assert not any(tmp_path.rglob("*"))
