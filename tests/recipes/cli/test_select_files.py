"""``curation select`` on features in files, with a memory budget."""

import json
import re

import numpy as np
import pytest

from curation.instances import CoverageInstanceSelector, coverage_shards
from curation.instances.selection_index import SelectionIndex
from curation.recipes import cli


def files_command(tmp_path, *options):
    cli.main(["select", "--features", str(tmp_path / "x.npy"), "--output", str(tmp_path / "kept.parquet"), *options])


def test_files_are_selected_from_without_a_recipe(tmp_path, capsys):
    x, y = np.random.default_rng(0).standard_normal((600, 5)), np.repeat([0, 1, 2], 200)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    files_command(tmp_path, "--labels", str(tmp_path / "y.npy"), "--memory", "2GB", "--budget", "0.1", "--seed", "3")
    expected = CoverageInstanceSelector(0.1, random_state=3).fit(x, y)
    index = SelectionIndex.load(tmp_path / "kept.parquet")
    assert index.indices.tolist() == expected.sample_indices_.tolist()
    assert index.size == 600
    assert json.loads(index.config)["memory"] == "2GB"
    assert "kept per class: 0: 20 of 200, 1: 20 of 200, 2: 20 of 200" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="`--output` must name a new file"):
        files_command(tmp_path, "--memory", "2GB")


def test_the_shards_of_files_are_kept_until_the_index_is_there(tmp_path, monkeypatch, capsys):
    x = np.random.default_rng(0).standard_normal((900, 5))
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(coverage_shards, "SHARD", 300)
    monkeypatch.setattr(coverage_shards, "fits_at_once", lambda *_: False)
    merge = coverage_shards._Work.merge
    monkeypatch.setattr(coverage_shards._Work, "merge", None)  # fails
    with pytest.raises(TypeError):
        files_command(tmp_path, "--memory", "6GB", "--jobs", "1")
    assert len(list((tmp_path / "kept.parquet.shards").iterdir())) == 3
    monkeypatch.setattr(coverage_shards._Work, "merge", merge)
    monkeypatch.setattr(coverage_shards, "choose", None)  # nothing is chosen again
    files_command(tmp_path, "--memory", "6GB", "--jobs", "1")
    assert "900 rows in 3 shards, 1 at once: about" in capsys.readouterr().out
    assert len(SelectionIndex.load(tmp_path / "kept.parquet").indices) == 36
    assert not (tmp_path / "kept.parquet.shards").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--memory", "much"], "`memory` must be bytes, such as '4GB', but got 'much'"),
        (["--memory", "1MB"], "`memory` must be at least"),
        (["--labels", "y.npy"], "`--labels` needs `--memory`, but got 'y.npy'"),
        (["--jobs", "2"], "`--jobs` needs `--memory`, but got 2"),
        (["--memory", "4GB", "--layer", "net"], "`--layer` must be left out with `--memory`, but got 'net'"),
        (["--memory", "4GB", "--config", "text_selection"], "without a recipe, but got ['--config'"),
        (
            ["--memory", "4GB", "--selector", "curation.instances.StratifiedRandomSelector"],
            "keyword argument 'memory'",
        ),
    ],
)
def test_options_of_files_that_cannot_be_used_are_named(options, error, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    with pytest.raises(SystemExit, match=re.escape(error)):
        files_command(tmp_path, *options)
