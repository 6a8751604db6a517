"""Private names of Lightning stand in one folder, so that a new version of Lightning breaks one folder."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PRIVATE_ROOM = ROOT / "callbacks" / "lightning"
ROOMS = ("curation", "callbacks", "recipes", "benchmarks")
PACKAGES = ("loops", "trainer", "strategies", "core", "plugins", "overrides", "accelerators", "utilities")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def sources(package: str) -> Iterator[ast.Module]:
    (folder,) = find_spec(package).submodule_search_locations
    for file in sorted(Path(folder).rglob("*.py")):
        yield ast.parse(file.read_text())


@cache
def names_of_lightning() -> frozenset[str]:
    """Private methods and attributes of its classes, and whatever a method assigns to ``self``."""
    names = set()
    packages = [f"lightning.pytorch.{package}" for package in PACKAGES]
    for tree in (tree for package in packages for tree in sources(package)):
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    names.add(name)
                case ast.ClassDef(body=body):
                    for member in body:
                        match member:
                            case ast.FunctionDef(name=name):
                                names.add(name)
                            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                                names.add(name)
    return frozenset(filter(is_private, names))


def uses(source: str) -> list[str]:
    """Private names of Lightning in a source, as ``line: name``."""
    private, lines = names_of_lightning(), []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                continue
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)):  # a string, as of `getattr`
                names = {name} & private
            case ast.ImportFrom(module=str(module), names=imported) if module.split(".")[0] == "lightning":
                names = set(filter(is_private, [*module.split("."), *(alias.name for alias in imported)]))
            case _:
                continue
        lines += [f"{node.lineno}: {name}" for name in sorted(names)]
    return lines


def test_private_names_stand_in_one_folder():
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    elsewhere = [file for file in files if PRIVATE_ROOM not in file.resolve().parents]
    assert len(elsewhere) > 50
    offenders = [f"{file.relative_to(ROOT)}:{use}" for file in elsewhere for use in uses(file.read_text())]
    assert not offenders, "move these into callbacks/lightning/loop.py:\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    "source",
    [
        "trainer.fit_loop._skip_backward",
        "trainer.fit_loop.epoch_loop._batches_that_stepped + 1",
        "self.trainer.fit_loop._should_accumulate()",
        "loop._combined_loader = None",
        "trainer._data_connector",
        "trainer.strategy._lightning_module",
        "pl_module._on_before_batch_transfer(batch)",
        "getattr(loop, '_data_fetcher')",
        "from lightning.pytorch.loops.fit_loop import _FitLoop",
        "from lightning.pytorch._graveyard import hpu",
    ],
)
def test_a_private_name_is_seen(source):
    assert len(uses(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["self._skip_backward", "super()._on_before_batch_transfer(x)", "trainer.fit_loop.max_epochs", "rule._losses"],
)
def test_other_names_are_not(source):
    assert not uses(source)


def test_the_room_itself_holds_some():
    assert any(uses(file.read_text()) for file in PRIVATE_ROOM.glob("*.py"))
