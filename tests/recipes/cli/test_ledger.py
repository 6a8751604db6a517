"""`curation ledger`: the questions a user has."""

import matplotlib.image
import pytest
from helpers import Classifier, loader, trainer

from curation.callbacks import SelectionLedger, UniformSelection
from curation.recipes import cli
from curation.records.ledger import Ledger


@pytest.fixture
def folder(tmp_path):
    path = str(tmp_path / "ledger")
    trainer(UniformSelection(keep=0.25), SelectionLedger(path), max_epochs=3).fit(Classifier(), loader())
    return path


def test_the_summary_counts_what_the_ledger_holds(folder, capsys):
    cli.main(["ledger", folder])
    printed = capsys.readouterr().out
    never = Ledger(folder).never_kept()
    assert printed.startswith("64 samples, 192 candidates, 48 kept\n")
    assert f"never kept: {len(never)} ({len(never) / 64:.1%}), such as {never[:10].tolist()}" in printed
    assert "kept most:  {} ({} times)".format(*Ledger(folder).most_kept()[0]) in printed
    assert "may be missing" not in printed


def test_the_history_of_a_sample_is_printed(folder, capsys):
    cli.main(["ledger", folder, "--sample", "5"])
    rows = capsys.readouterr().out.splitlines()[1:]
    history = Ledger(folder).history(5)
    assert [int(row.split()[0]) for row in rows] == history["step"].tolist()
    assert [int(row.split()[2]) for row in rows] == history["kept"].tolist()


def test_a_picture_is_drawn_and_an_open_ledger_is_mentioned(folder, tmp_path, capsys):
    (tmp_path / "ledger/rank=0/closed").unlink()
    cli.main(["ledger", folder, "--picture", str(tmp_path / "p.png"), "--size", "70"])
    printed = capsys.readouterr().out
    assert "rank=0 did not close its files (killed, or still running): rows after step 23 may be missing" in printed
    assert printed.startswith("70 samples")
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0.05


def test_a_folder_without_a_ledger_is_named_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^curation: Argument `path` must be the folder of a ledger"):
        cli.main(["ledger", str(tmp_path)])
