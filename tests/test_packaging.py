"""The wheel gives all three rooms, the rooms depend one way, and the core needs no extra."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = (
    "datasets",
    "faiss",
    "sklearn",
    "scikit_learn",
    "transformers",
    "wandb",
    "matplotlib",
    "jsonargparse",
    "scipy",
    "joblib",
)


def imports_of(file: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("curation", ("lightning", "pytorch_lightning", "curation.callbacks", "curation.recipes")),
        ("callbacks", ("curation.recipes", "pytorch_lightning", "lightning.fabric")),
    ],
)
def test_rooms_depend_one_way(room, forbidden):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        bad = [n for n in imports_of(file) for f in forbidden if n == f or n.startswith(f + ".")]
        assert not bad, f"{file.name} imports {bad}"
        heavy = [n for n in imports_of(file, top_level_only=True) if n.split(".")[0] in EXTRAS]
        assert not heavy, f"{file.name} imports {heavy} at its top"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("curation", "callbacks", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_rooms_and_the_recipes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert tops == {"curation", next(t for t in tops if t.endswith(".dist-info"))}
    for room, folder in (
        ("curation", "curation"),
        ("callbacks", "curation/callbacks"),
        ("recipes", "curation/recipes"),
    ):
        for file in (ROOT / room).rglob("*"):  # which follows no links
            if file.suffix in (".py", ".yaml") and "__pycache__" not in file.parts:
                assert f"{folder}/{file.relative_to(ROOT / room)}" in names
    assert "curation/py.typed" in names


def test_core_imports_from_the_wheel_without_any_extra(wheel, tmp_path):
    """In an empty folder, with a site that has only the core's packages."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    site = tmp_path / "site"
    site.mkdir()
    installed = next(Path(p) for p in sys.path if p.endswith("site-packages") and (Path(p) / "torch").exists())
    for entry in installed.iterdir():
        name = entry.name.lower()
        if not name.startswith(EXTRAS) and not name.endswith(".pth") and "curation" not in name:
            (site / entry.name).symlink_to(entry)
    code = (
        "import sys, curation, curation.callbacks, curation.recipes, curation.online.utility_diversity\n"
        "from importlib.resources import files\n"
        f"assert curation.__file__.startswith({str(tmp_path)!r}), curation.__file__\n"
        "assert any(f.name.endswith('.yaml') for f in files('curation.recipes').joinpath('chat').iterdir())\n"
        f"bad = [m for m in {EXTRAS!r} if m in sys.modules]\n"
        "assert not bad, bad\n"
    )
    (tmp_path / "empty").mkdir()
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'wheel'}{os.pathsep}{site}"}
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path / "empty", env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
