"""The page of `curation doctor` says what a report of a fault needs, and nothing private."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from curation.recipes import cli
from curation.recipes.cli import doctor


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory in which the command is run."""
    (tmp_path / "jane" / "work").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "jane")
    monkeypatch.chdir(tmp_path / "jane" / "work")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "jane"


def page(capsys):
    cli.main(["doctor"])
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


def test_it_has_versions_extras_devices_and_disk(home, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = page(capsys)
    assert found["lightning-curation"].strip().startswith(version("lightning-curation"))
    assert f"torch {torch.__version__}" in found["packages"]
    assert {"extra recipes", "extra select", "extra demo"} <= found.keys()
    assert f"{torch.get_num_threads()} threads of torch" in found["devices"]
    assert found["hub"].strip() == "HF_HUB_OFFLINE 1"
    assert found["disk here"].strip().endswith("GB free, in ~/work")
    assert len(found) < 25


def test_an_extra_names_what_it_lacks(monkeypatch):
    needs = [
        "torch>=2", 'numpy>=1; extra == "one"', 'no-such-package>=3; extra == "two"', 'numpy>=999; extra == "two"',
        'lightning-curation[one]; extra == "two"',
    ]  # fmt: skip
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    there = version("numpy")
    assert doctor.extras() == {"one": "all there", "two": f"lacks no-such-package>=3 (missing), numpy>=999 ({there})"}


def test_the_home_directory_is_not_shown(home, capsys):
    cli.main(["doctor"])
    assert str(home) not in capsys.readouterr().out
    assert doctor.without_home(f"{home}/a {home}\n{home}.old") == f"~/a ~\n{home}.old"


@pytest.mark.parametrize(
    ("netrc", "key", "known"),
    [
        (None, None, False),
        ("machine api.wandb.ai login user password s3cret\n", None, True),
        ("machine other.host login user password s3cret\n", None, False),
        ("machine", None, False),  # damaged
        (None, "s3cret", True),
    ],
)
def test_wandb_is_logged_in_or_not_and_the_key_is_not_shown(home, netrc, key, known, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if netrc is not None:
        (home / ".netrc").write_text(netrc)
        (home / ".netrc").chmod(0o600)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    found = page(capsys)
    state = "logged in" if known else "not logged in"
    assert found["W&B"].strip() == f"{version('wandb')}, WANDB_MODE offline, {state}"
    assert not any("s3cret" in text for text in found.values())
