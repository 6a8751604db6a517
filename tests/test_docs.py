"""The site builds, has everything and fetches nothing; what the tutorials say to type works."""

import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import Classifier, loader, trainer
from markdown_it import MarkdownIt

import curation
from curation import callbacks
from curation.recipes import cli
from curation.recipes.catalogue import with_recipe_files
from curation.recipes.cli import audit, compare, export, select
from curation.recipes.compare import arms
from curation.recipes.compare.workload import make_workload

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIALS = [DOCS / "quickstart.md", *sorted((DOCS / "tutorials").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
by_name = pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a page."""
    return FENCE.findall(page.read_text())


def build(folder: Path, config: Path) -> subprocess.CompletedProcess:
    # Not --quiet: then --strict counts no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), "-f", str(config)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    run = build(folder, ROOT / "mkdocs.yml")
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.parametrize("link", ["index.md#nowhere", "nothing.md", "/index.md"])
def test_a_broken_link_stops_the_build(link, tmp_path):
    """With the options of the site, and none of what it is made of."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"[there]({link})")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\nnav: [index.md]\nhooks: []\nplugins: []\nwatch: []\n")
    run = build(tmp_path / "site", config)
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"'{link}'" in run.stderr


def pages(site: Path) -> dict[Path, str]:
    return {file: file.read_text() for file in site.rglob("*.html") if file.relative_to(site).parts[0] != "assets"}


def references(html: str, attributes: str = "src|href") -> list[str]:
    return re.findall(rf'\b(?:{attributes})="([^"#]+)', html)


def inventory(site: Path) -> set[str]:
    """Names of all objects that the reference describes."""
    lines = (site / "objects.inv").read_bytes().split(b"\n", 4)
    return {line.split()[0] for line in zlib.decompress(lines[4]).decode().splitlines()}


def test_no_page_fetches_anything(site):
    for file, html in pages(site).items():
        head = html[: html.index("</head>")] if "</head>" in html else ""
        loaded = references(html, "src") + references("".join(re.findall(r"<link [^>]*>", head)), "href")
        remote = [url for url in loaded if re.match(r"(https?:)?//", url)]
        assert not remote, f"{file.name} loads {remote}"


def test_every_result_can_be_reached(site):
    linked = {
        (file.parent / reference).resolve()
        for file, html in pages(site).items()
        for reference in references(html)
        if not re.match(r"\w+:|//", reference)
    }
    results = [
        f for f in (DOCS / "results").iterdir() if f.suffix in (".html", ".png") or f.stem.endswith("_ablation")
    ]
    assert len(results) > 20
    for file in results:
        name = file.name if file.suffix != ".md" else f"{file.stem}.html"
        if file.suffix != ".json":
            assert (site / "results" / name).resolve() in linked, f"no page links to {file.name}"


def test_reference_has_every_callback(site):
    known = inventory(site)
    missing = [name for name in callbacks.__all__ if f"curation.callbacks.{name}" not in known]
    assert not missing, f"docs/api/callbacks.md lacks {missing}"


def test_reference_has_every_module(site):
    rooms = ("curation.callbacks", "curation.recipes")
    modules = [
        m.name
        for m in pkgutil.walk_packages(curation.__path__, "curation.", onerror=lambda name: None)
        if not m.ispkg and not m.name.startswith(rooms)
    ]
    assert len(modules) > 30
    missing = set(modules) - inventory(site)
    assert not missing, f"docs/api/ lacks {sorted(missing)}"


def test_roles_of_docstrings_become_links(site):
    for file in (site / "api").glob("*.html"):
        html = file.read_text()
        assert not re.search(r":(meth|class|func|mod|attr):<", html), file.name
        assert ".. math::" not in html, file.name
    online = (site / "api" / "callbacks.html").read_text()
    assert re.search(r'<a [^>]*href="#curation.callbacks.OnlineSelection.score"[^>]*><code>score</code>', online)


def test_lists_and_tables_are_those_of_commonmark(site):
    markdown = MarkdownIt("commonmark").enable("table")
    for page in sorted(DOCS.glob("*.md")):
        if page.name in ("README.md", "reports.md"):
            continue
        there = markdown.render(page.read_text())
        html = (site / f"{page.stem}.html").read_text()
        here = html[html.index("<article") : html.index("</article")]
        for tag in ("li", "ol", "ul", "table", "td", "pre", "h2", "h3"):
            counts = [len(re.findall(rf"<{tag}[ >]", text)) for text in (there, here)]
            assert counts[0] == counts[1], f"{page.name}: {counts} of <{tag}>"


@pytest.mark.parametrize("page", [*TUTORIALS, DOCS / "faq.md"], ids=lambda page: page.stem)
def test_python_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    namespace = {"__name__": "page", "print": lambda *args: printed.append(" ".join(map(str, args)))}
    found = blocks(page)
    assert "python" in [language for language, _ in found]
    for i, (language, text) in enumerate(found):
        if language == "python":
            printed.clear()
            exec(compile(text, f"{page.name}, block {i}", "exec"), namespace)
        elif language == "text":
            assert printed == text.splitlines()


@by_name
def test_commands_of_a_page_are_accepted(page, tmp_path, monkeypatch, capsys):
    """In their order, in a folder with the page's own rule; `--ckpt_path` names a file of an earlier command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rules = [text for language, text in blocks(page) if language == "python" and "class HighLoss" in text]
    (tmp_path / "my_rule.py").write_text("".join(rules).partition("\n\n\nTrainer")[0])
    commands = [
        re.sub(r" --ckpt_path=\S+", "", line)
        for language, text in blocks(page)
        if not language
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("curation ")
    ]
    assert commands
    for command in commands:
        _, subcommand, *args = shlex.split(command, comments=True)
        if subcommand == "fit":
            assert arms.resolve(with_recipe_files(args))["model"]["class_path"]
        elif subcommand == "compare":
            options, overrides = compare.parse(args)
            assert [make_workload(recipe, overrides, options).arms for recipe in options.recipes]
        elif subcommand == "select" and "--memory" in command:
            np.save("features.npy", np.random.default_rng(0).random((50, 3)))
            np.save("labels.npy", np.arange(50) % 2)
            cli.main([subcommand, *args])
            assert "2 of 50 samples kept" in capsys.readouterr().out
        elif subcommand == "select":
            options, rest = select.parse(args)
            select.make_selector(options)
            select.make_object("probe", options.probe, {}, {})
            assert arms.resolve(with_recipe_files(rest))["data"]["class_path"]
        elif subcommand == "audit":
            options, rest = audit.parse(args)
            assert options.record.endswith(".parquet")
            assert arms.resolve(with_recipe_files(rest))["data"]["class_path"]
        elif subcommand in ("recipes", "doctor", "--version"):
            cli.main([subcommand, *args])
            assert capsys.readouterr().out
        elif subcommand == "export":
            (tmp_path / args[0]).mkdir(parents=True)
            (tmp_path / args[0] / "config.yaml").write_text("")
            (tmp_path / args[0] / "last.ckpt").write_text("")
            assert export.parse(args).to.name == args[-1]
        elif subcommand == "ledger":
            ledger = callbacks.SelectionLedger(args[0])
            trainer(callbacks.UniformSelection(keep=0.25), ledger, max_epochs=1).fit(Classifier(), loader())
            cli.main([subcommand, *args])
            assert capsys.readouterr().out
        else:
            pytest.fail(f"no check for {command!r}")
    sys.modules.pop("my_rule", None)


def test_the_file_tree_is_that_of_the_sources():
    spec = importlib.util.spec_from_file_location("file_tree", DOCS / "extensions" / "file_tree.py")
    file_tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file_tree)
    expected = file_tree.page()
    rows = [line.split(maxsplit=1) for _, text in FENCE.findall(expected) for line in text.splitlines()]
    sources = [f for room in file_tree.ROOMS for f in (ROOT / room).rglob("*") if f.suffix in (".py", ".yaml")]
    listed = sorted(row[0] for row in rows if not row[0].endswith("/"))
    assert listed == sorted(f.name for f in sources if f.name != "__init__.py")
    undescribed = [row[0] for row in rows if len(row) == 1]
    assert not undescribed, f"no docstring or first comment in {undescribed}"
    assert (DOCS / "files.md").read_text() == expected, "docs/files.md is out of date: `make tree` rewrites it"


def test_the_architecture_names_files_that_exist():
    text = (DOCS / "architecture.md").read_text()
    paths = set(re.findall(r"`((?:curation|callbacks|recipes|tests)/[\w/]*(?:\.py)?)`", text))
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
    compare = text[text.index("## Comparing") :].partition("\n\n")[2].partition("\n\n")[0]
    names = re.findall(r"`(\w+\.py)`", compare)
    assert len(names) > 5
    assert not [name for name in names if not (ROOT / "recipes/compare" / name).exists()]
