"""Coverage in shards: the answer in memory where all fits, and one answer whatever the workers, crashes and files."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import parallel_config
from sklearn.datasets import make_blobs

from curation.instances import CoverageInstanceSelector, FeatureShards, coverage_shards
from curation.instances.coverage_shards import (
    LIBRARIES,
    MappedRows,
    Part,
    measure,
    open_features,
    plan_shards,
    standardisation,
    together,
)

MEMORY = 6 * 10**9


@pytest.fixture(scope="module")
def data():
    x, y = make_blobs(3000, 6, centers=12, cluster_std=0.7, random_state=0)
    return x.astype(np.float32), y % 3


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 700 rows, though memory has room for all."""
    monkeypatch.setattr(coverage_shards, "SHARD", 700)
    monkeypatch.setattr(coverage_shards, "fits_at_once", lambda *_: False)


def select(x, y, **options):
    return CoverageInstanceSelector(0.05, random_state=0, memory=MEMORY, **options).fit(x, y)


def saved(folder, x):
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


@pytest.mark.parametrize("budget", [0.04, 0.5, 1.0])
def test_where_one_shard_holds_everything_the_answer_is_that_in_memory(data, tmp_path, budget):
    x, y = data
    expected = CoverageInstanceSelector(budget, random_state=0).fit(x, y)
    for given_x in (x, saved(tmp_path, x), np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(x)):
        found = CoverageInstanceSelector(budget, random_state=0, memory="2GB").fit(given_x, y)
        assert found.ranking_.tolist() == expected.ranking_.tolist()
        assert found.scores_.tolist() == expected.scores_.tolist()
        assert "shards" not in found.report_


@pytest.mark.parametrize("targets", ["classes", "numbers", None])
@pytest.mark.parametrize("strategy", ["proportional", "equal"])
def test_as_many_of_each_class_stay_as_in_memory(small_shards, data, targets, strategy):
    x, y = data
    y = {"classes": y, "numbers": x[:, 0].astype(np.float64), None: None}[targets]
    expected = CoverageInstanceSelector(0.05, sampling_strategy=strategy, random_state=0).fit(x, y)
    found = select(x, y, sampling_strategy=strategy)
    assert found.report_["shards"] == 5
    assert found.report_["kept_per_class"] == expected.report_["kept_per_class"]
    assert sorted(found.ranking_.tolist()) == found.sample_indices_.tolist()
    assert len(np.unique(found.ranking_)) == expected.report_["kept"]
    assert (found.scores_[found.sample_indices_] > 0).all()
    assert np.count_nonzero(found.scores_) == expected.report_["kept"]


def test_the_objective_is_near_that_in_memory_and_far_above_chance(small_shards, data):
    x, y = data

    def covered(rows):
        return sum(
            torch.cdist(torch.from_numpy(x[y == c]), torch.from_numpy(x[rows[y[rows] == c]])).amin(1).sum().item()
            for c in range(3)
        )

    whole = covered(CoverageInstanceSelector(0.05, random_state=0).fit(x, y).sample_indices_)
    chance = covered(np.random.default_rng(0).permutation(3000)[:150])
    assert covered(select(x, y).sample_indices_) < whole + 0.25 * (chance - whole)


def test_rows_that_are_sorted_by_cluster_are_covered_as_well(small_shards, data):
    x, _ = data
    order = np.argsort(x[:, 0], kind="stable")
    found = order[select(x[order], None).sample_indices_]
    places = np.searchsorted(np.quantile(x[:, 0], [0.2, 0.4, 0.6, 0.8]), x[found, 0])
    assert np.bincount(places, minlength=5).min() > 0.5 * len(found) / 5


def test_the_answer_is_that_of_any_number_of_workers_and_of_any_source(small_shards, data, tmp_path):
    x, y = data
    expected = select(x, y).ranking_.tolist()
    folder = tmp_path / "parts"
    folder.mkdir()
    lists = pa.array(list(x[:1000]), pa.list_(pa.float32()))
    pq.write_table(pa.table({"features": lists}), folder / "a.parquet", row_group_size=300)
    np.save(folder / "b.npy", x[1000:1500])
    np.save(folder / "c.npy", x[1500:])
    np.save(tmp_path / "y.npy", y)
    wider = np.lib.format.open_memmap(tmp_path / "wider.npy", "w+", np.float32, (3300, 6))
    wider[300:] = x
    sources = [saved(tmp_path, x), folder, FeatureShards(folder), sorted(folder.iterdir()), wider[300:], wider]
    for source in sources[:-1]:
        assert select(source, tmp_path / "y.npy").ranking_.tolist() == expected
    for source in (x, folder, wider[300:]):
        assert select(source, y, n_jobs=2).ranking_.tolist() == expected
    with parallel_config("threading", n_jobs=3):
        assert select(folder, y).ranking_.tolist() == expected


def test_dask_gives_the_same_answer(small_shards, data, tmp_path):
    from distributed import Client, LocalCluster

    x, y = data
    expected = select(x, y).ranking_.tolist()
    file = saved(tmp_path, x)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster),
        parallel_config("dask"),
    ):
        assert select(file, y, n_jobs=-1, folder=tmp_path / "shards").ranking_.tolist() == expected
    assert len(list((tmp_path / "shards").glob("shard-*.npz"))) == 5


def test_finished_shards_are_not_made_again_and_others_are(small_shards, data, tmp_path, monkeypatch):
    x, y = data
    made = []
    choose = coverage_shards.choose
    monkeypatch.setattr(coverage_shards, "choose", lambda *of: (made.append(of[0]), choose(*of)))

    def count(*of, **options):
        made.clear()
        ranking = select(*of, folder=tmp_path, **options).ranking_.tolist()
        return len(made), ranking

    first, expected = count(x, y)
    assert first == 5
    assert count(x, y) == (0, expected)
    sorted(tmp_path.iterdir())[2].unlink()
    assert count(x, y) == (1, expected)
    other = x.copy()
    other[2900, 3] += 0.5  # changes the mean and so every shard
    assert count(other, y)[0] == 5
    other_y = y.copy()
    other_y[0] = (y[0] + 1) % 3  # shares of all shards may round otherwise; the codes are those of the first
    assert count(x, other_y)[0] >= 1
    assert count(x, y, n_views=2)[0] == 5
    assert count(x, y, n_neighbors=7)[0] == 5
    assert count(x, y) == (0, expected)


SCRIPT = """
import sys, time
import numpy as np
from curation.instances import CoverageInstanceSelector, coverage_shards
coverage_shards.SHARD, coverage_shards.fits_at_once = 700, lambda *_: False
choose = coverage_shards.choose
def slow(*of):
    choose(*of)
    print("made", flush=True)
    time.sleep(float(sys.argv[3]))
coverage_shards.choose = slow
found = CoverageInstanceSelector(0.05, random_state=0, memory=6 * 10**9, folder=sys.argv[2]).fit(sys.argv[1])
print(found.ranking_.tolist())
"""


def test_a_fit_that_was_killed_goes_on(small_shards, data, tmp_path):
    file, folder = saved(tmp_path, data[0]), tmp_path / "shards"
    expected = select(file, None).ranking_.tolist()
    command = [sys.executable, "-c", SCRIPT, str(file), str(folder)]
    with subprocess.Popen([*command, "600"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "made\n"
        os.kill(process.pid, signal.SIGKILL)
    assert len(list(folder.glob("shard-*.npz"))) == 1
    lines = subprocess.run([*command, "0"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["made"] * 4 + [str(expected)]


PEAK = """
import sys
from pathlib import Path
import numpy as np
from curation.instances import CoverageInstanceSelector, coverage_shards
CoverageInstanceSelector(random_state=0).fit(np.random.rand(500, 4))  # compiles
coverage_shards.SHARD, coverage_shards.fits_at_once = int(sys.argv[2]), lambda *_: False
def bytes_of(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
before = bytes_of("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
found = CoverageInstanceSelector(0.04, random_state=0, memory=6 * 10**9).fit(sys.argv[1])
print(found.report_["shards"], before, bytes_of("VmHWM"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_memory_of_a_process_stays_within_the_plan(tmp_path, monkeypatch):
    n, d = 200_000, 64
    saved(tmp_path, np.random.default_rng(0).standard_normal((n, d), np.float32))
    monkeypatch.setattr(coverage_shards, "SHARD", n // 4)
    plan = plan_shards(n, d, 4 * n // 25, MEMORY, 10, 1)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x.npy"), str(n // 4)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    shards, before, most = map(int, lines)
    assert shards == len(plan.cuts) - 1 == 4
    assert before < 1.25 * LIBRARIES  # other versions of torch
    assert most - before < plan.bytes - LIBRARIES
    assert plan.bytes - LIBRARIES < n * d * 4 * 4  # in memory it takes more than six times the features


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 10**8),
    st.integers(1, 2000),
    st.floats(0.001, 1),
    st.integers(1, 64),
    st.integers(10, 25),
    st.data(),
)
def test_a_plan_covers_all_rows_and_stays_within_the_memory(n, d, share, jobs, k, data):
    candidates = max(1, round(n * share))
    memory = data.draw(st.integers(10**8, 10**12))
    try:
        plan = plan_shards(n, d, candidates, memory, k, jobs)
    except ValueError as error:
        least = int(str(error).split(" bytes")[0].split()[-1])  # is enough
        assert memory < least
        plan = plan_shards(n, d, candidates, least, k, jobs)
        memory = least
    assert plan.bytes <= memory
    assert plan.cuts[0] == 0
    assert plan.cuts[-1] == n
    assert (np.diff(plan.cuts) > 0).all()
    assert plan.groups[0] == 0
    assert plan.groups[-1] == len(plan.cuts) - 1
    assert (np.diff(plan.groups) > 0).all()
    assert 1 <= plan.workers <= jobs
    alone = plan_shards(n, d, candidates, memory, k, 1)
    assert alone.cuts.tolist() == plan.cuts.tolist()
    assert alone.groups.tolist() == plan.groups.tolist()


def test_several_merges_keep_as_many_of_each_class(small_shards, data, monkeypatch):
    x, y = data
    plan = coverage_shards.plan_shards

    def apart(*of):
        one = plan(*of)
        return coverage_shards.Plan(one.cuts, np.array([0, 2, 3, 5]), one.workers, one.bytes)

    expected = select(x, y)
    monkeypatch.setattr(coverage_shards, "plan_shards", apart)
    order = np.argsort(y, kind="stable")  # groups that lack a class
    for rows in (np.arange(3000), order):
        found = select(x[rows], y[rows])
        assert found.report_["kept_per_class"] == expected.report_["kept_per_class"]
        assert len(np.unique(found.ranking_)) == 150


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i4", "u1"])
def test_features_are_standardised_as_in_memory(kind, data, monkeypatch):
    monkeypatch.setattr(coverage_shards, "BLOCK", 500)
    x = (data[0] * 20 + 100).astype(kind)
    x[:, 2] = 7  # constant
    parts = [Part(x[a:b], a, b, a) for a, b in ((0, 1000), (1000, 1001), (1001, 3000))]
    moments = [(part.stop - part.start, *measure(part)[:2]) for part in parts]
    n, mean, squares = together(moments)
    assert n == 3000
    np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(squares / n, x.astype(np.float64).var(0), rtol=1e-9, atol=1e-12)
    mean, deviation = standardisation(moments, kind != "f4")
    assert deviation[2] == np.inf
    assert np.isfinite(np.delete(deviation, 2)).all()


def test_a_view_of_a_memory_map_is_opened_at_its_place(tmp_path):
    x = np.arange(60.0).reshape(12, 5)
    mapped = np.load(saved(tmp_path, x), mmap_mode="r")
    for view, expected in ((mapped, x), (mapped[3:], x[3:]), (mapped[3:][2:6], x[5:9])):
        opened = open_features(view, MEMORY)
        assert isinstance(opened, MappedRows)
        assert opened[1:3].tolist() == expected[1:3].tolist()
    assert not isinstance(open_features(mapped[:, 1:], MEMORY), MappedRows)
    assert open_features(mapped[::2], MEMORY)[1:3].tolist() == x[2:5:2].tolist()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 2e35])
def test_a_row_that_is_not_finite_is_named_by_its_file(small_shards, data, tmp_path, monkeypatch, wrong):
    x, y = data
    x = x.copy()
    x[1234, 2] = wrong
    np.save(tmp_path / "a.npy", x[:1000])
    np.save(tmp_path / "b.npy", x[1000:])
    with pytest.raises(ValueError, match=r"finite numbers of at most 1e35, but row 234 of '.*b\.npy' has others"):
        select(tmp_path, y)
    with monkeypatch.context() as patch:
        patch.setattr(coverage_shards, "fits_at_once", lambda *_: True)
        with pytest.raises(ValueError, match=r"but row 234 of '.*b\.npy' has others"):
            select(tmp_path, y)
    mapped = np.load(tmp_path / "b.npy", mmap_mode="r")
    with pytest.raises(ValueError, match=r"finite numbers of at most 1e35, but row 234 of '.*b\.npy' has others"):
        select(mapped, None)
    with pytest.raises(ValueError, match="finite numbers of at most 1e35, but row 1234 has others"):
        select(x, y)
    if wrong != 2e35:
        with pytest.raises(ValueError, match="but row 1234 has others"):
            select(x.astype(np.float16), y)


def test_what_cannot_be_used_is_named_before_the_work(data, tmp_path, monkeypatch):
    x, y = data
    file = saved(tmp_path, x)

    def fit(x=x, y=y, memory="2GB", **options):
        return CoverageInstanceSelector(memory=memory, **options).fit(x, y)

    monkeypatch.setattr(coverage_shards, "measure", None)  # nothing is read
    monkeypatch.setattr(coverage_shards, "fits_at_once", lambda *_: False)
    with pytest.raises(
        ValueError, match=r"`memory` must be at least \d+ bytes for 3000 rows of 6 features, but got 1000"
    ):
        fit(file, memory=1000)
    with pytest.raises(ValueError, match="`memory` must be bytes, such as '4GB', but got 'much'"):
        fit(file, memory="much")
    with pytest.raises(ValueError, match="`n_jobs` must be an integer other than 0 or None, but got 0"):
        fit(file, n_jobs=0)
    with pytest.raises(ValueError, match="`folder` must be a string or None, but got 3"):
        fit(file, folder=3)
    with pytest.raises(ValueError, match="`verbose` must be True or False, but got 1"):
        fit(file, verbose=1)
    with pytest.raises(ValueError, match=r"there is no '.*none\.npy'"):
        fit([file, tmp_path / "none.npy"])
    with pytest.raises(ValueError, match=r"`y` must be \[3000\], a target for each row, but is \[2999\]"):
        fit(file, y[1:])
    with pytest.raises(ValueError, match=r"`X` must be \[N, D\] numbers, but is float32 \[3000\]"):
        fit(x[:, 0])
    np.save(tmp_path / "narrow.npy", x[:, :5])
    with pytest.raises(ValueError, match=r"hold 6 floats in each row, as '.*x\.npy' does, but group 0 of '.*narrow"):
        fit([file, tmp_path / "narrow.npy"])
    for empty in ([], np.zeros((0, 3)), [["a", "b"]]):
        with pytest.raises(ValueError, match=r"`X` must be \[N, D\] numbers, but is"):
            fit(empty)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FileExistsError, match="taken"):
        fit(file, folder=tmp_path / "taken")
    with pytest.raises(ValueError, match="Input y contains NaN"):
        fit(file, np.full(3000, np.nan))


def test_an_estimate_is_said_before_the_work(small_shards, data, capsys):
    select(*data, verbose=True)
    said = capsys.readouterr().out
    assert re.match(r"3,000 rows in 5 shards, 1 at once: about \d+ s, and 0.7 GB with libraries\n", said)
