"""The picture of batch sizes and noise scales."""

import pytest
from helpers import trainer
from lines import ROWS, Line, fit, points
from torch.utils.data import DataLoader

from curation.callbacks import AdaptiveBatchSize, BatchSizeScheduler
from curation.recipes.batch_size_picture import BatchSizePicture, draw


@pytest.mark.parametrize("callback", [BatchSizeScheduler, AdaptiveBatchSize])
def test_a_fit_ends_with_a_picture(tmp_path, callback):
    file = tmp_path / "sizes.png"
    fit(Line(), 40 * ROWS, callback(first=2 * ROWS), BatchSizePicture(file), epochs=1)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_fit_of_one_size_has_none(tmp_path):
    trainer(BatchSizePicture(tmp_path / "sizes.png")).fit(Line(), DataLoader(points(8), ROWS))
    assert not list(tmp_path.iterdir())


def test_the_picture_has_the_sizes_and_the_finite_noise_scales():
    axes = draw([(0, 4), (8, 8)], 24, [(2, 3.0), (9, float("inf")), (10, 5.0)]).axes[0]
    stairs, noise = axes.get_lines()
    assert [list(stairs.get_xdata()), list(stairs.get_ydata())] == [[0, 8, 24], [4, 8, 8]]
    assert [list(noise.get_xdata()), list(noise.get_ydata())] == [[2, 10], [3.0, 5.0]]
