"""The wheel gives all three rooms, the rooms depend one way, the core needs no extra, and users see types."""

import ast
import contextlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import curation

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
def source(tmp_path_factory):
    """A copy of what the package is made of: builds and installations leave files there."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("curation", "callbacks", "recipes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
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


@pytest.fixture(scope="module")
def type_cache(tmp_path_factory):
    """Begins with what `make test` has checked before, if it has: torch alone takes mypy half a minute."""
    folder = tmp_path_factory.mktemp("types") / "cache"
    with contextlib.suppress(OSError):  # none there, or a file that another mypy replaced meanwhile
        shutil.copytree(ROOT / ".mypy_cache", folder)
    return folder


def environment(folder: Path) -> Path:
    """The Python of a new environment that has the packages of this one, but not this project."""
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    (site,) = {Path(sysconfig.get_path(name, "venv", paths)) for name in ("purelib", "platlib")}
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    return folder / "bin" / "python"


def public_names() -> list[tuple[str, str]]:
    """Every name in the ``__all__`` of ``curation`` and its packages, with the package."""
    packages = [m.name for m in pkgutil.iter_modules(curation.__path__, "curation.") if m.ispkg]
    return [(package, name) for package in packages for name in getattr(import_module(package), "__all__", ())]


@pytest.mark.parametrize("installed_from", ["source, editable", "wheel"])
def test_a_users_file_is_checked_against_the_types_of_every_public_name(
    installed_from, source, wheel, type_cache, tmp_path
):
    python = environment(tmp_path / "environment")
    what = ["-e", str(source)] if "editable" in installed_from else [str(wheel)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--ignore-installed"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, *offline, *what], check=True, capture_output=True)
    names = public_names()
    assert {("curation.callbacks", "OnlineSelection"), ("curation.samplers", "ConceptAwareSampler")} <= set(names)
    lines = [f"from {package} import {name} as public_{i}" for i, (package, name) in enumerate(names)]
    lines += [
        "from curation.callbacks import HardSampleSelection",
        "from curation.recipes.catalogue import find_recipe",
        "",
        *(f"reveal_type(public_{i})" for i in range(len(names))),
        "reveal_type(find_recipe)",
        "reveal_type(HardSampleSelection(keep=0.5).samples_scored)",
        'HardSampleSelection(keep="half")  # type: ignore[arg-type]',  # an error too where the type is Any
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "user.py").write_text("\n".join(lines) + "\n")
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(type_cache),
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    run = subprocess.run(
        [*mypy, "--python-executable", str(python), "user.py"], cwd=empty, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    revealed = re.findall(r'Revealed type is "(.*)"', run.stdout)
    assert len(revealed) == len(names) + 2, run.stdout
    assert revealed[-2:] == ["def (name: str) -> pathlib.Path", "int"]
    untyped = [names[i] for i, text in enumerate(revealed[:-2]) if text == "Any"]
    assert not untyped


def test_the_version_is_said_alike_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    released = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == (version, str(citation["date-released"]))


def test_issue_templates_are_forms_of_github():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "feature", "finding"]
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= content.keys()
        fields = [field["id"] for field in content["body"]]
        assert len(fields) == len(set(fields))
        assert all(field["attributes"]["label"] for field in content["body"])
