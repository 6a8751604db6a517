"""docs/adding_an_algorithm.md, followed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r'^```python title="(\S+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture
def blocks():
    return BLOCK.findall((ROOT / "docs/adding_an_algorithm.md").read_text())


def test_the_contract_suite_picks_up_an_algorithm_added_by_the_page(blocks, tmp_path):
    for room in ("curation", "callbacks", "recipes", "tests"):
        shutil.copytree(ROOT / room, tmp_path / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, code in blocks:
        with (tmp_path / name).open("a") as file:
            file.write(code)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/contract", "-k", "Margin", "-p", "no:cacheprovider", "-W", "ignore"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert run.stdout.count(".") > 20, run.stdout


def test_it_takes_less_than_sixty_lines(blocks):
    assert sum(len([line for line in code.splitlines() if line.strip()]) for _, code in blocks) < 60
