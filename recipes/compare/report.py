"""The report of a comparison: one HTML page, JSON, a table in the terminal, and a W&B run."""

import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.files import replacing
from curation.recipes.compare import equal_quality
from curation.recipes.compare.pictures import draw
from curation.recipes.compare.summary import build, failures, final_value
from curation.recipes.compare.verdict import interval, notes, number, verdict, verdicts
from curation.recipes.pictures import picture

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:86rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}.wide{overflow-x:auto}
th:first-child,td:first-child{text-align:left}svg{width:100%;height:auto}
code,pre{background:#f4f4f4;padding:.1rem .3rem;white-space:pre-wrap;overflow-wrap:anywhere}
h2{margin-top:2.5rem}.won{color:#136f2d}.lost{color:#a11}.failed{color:#a11;font-weight:600}details{margin:1rem 0}"""

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {  # cells made from the summary of an arm
    "final": lambda arm: (
        number(arm["final"]) + ("" if math.isnan(arm["deviation"]) else f" ± {arm['deviation']:.2g}")
    ),
    "minus uniform, 95 %": lambda arm: interval(arm["difference"]) if arm["difference"] else "",
    "minus full, 95 %": lambda arm: interval(arm["minus_full"]) if arm["minus_full"] else "",
    "seconds to target": lambda arm: number(arm["time_to_target"]),
    "steps": lambda arm: number(arm["steps"]),
    "trained on": lambda arm: number(arm["samples_trained"]),
    "scored": lambda arm: number(arm["samples_scored"]),
    "FLOPs": lambda arm: number(arm["flops"]),
    "seconds": lambda arm: number(arm["seconds"]),
    "peak memory": lambda arm: f"{arm['peak_memory'] / 2**20:.0f} MiB",
}
RATIOS = ["arm", "metric", "full's", "time, of full's", "FLOPs, of full's"]  # columns of the cost ratios


def read(file: Path) -> dict[str, Any]:
    """The content of a report, computed anew from its JSON.

    Args:
        file: ``report.json`` of a comparison.

    Raises:
        ValueError: If the file is not the report of a comparison.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(file.read_text())
        content = build(content["command"], content["workloads"])
        draw(content)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is not the report of a comparison ({error!r}).") from error
    return content


def write(content: dict[str, Any], stem: Path) -> None:
    """Write a report: ``stem`` with .json, .html, .png and .svg.

    Args:
        content: The content, from :func:`curation.recipes.compare.summary.build`.
        stem: Path of the files without the suffix.

    Raises:
        OSError: If a file cannot be written.
    """
    figure = draw(content)
    svg, png = picture(figure, "svg"), picture(figure, "png")
    page = as_html(content, svg.decode())
    for kind, data in (("json", as_json(content).encode()), ("svg", svg), ("png", png), ("html", page.encode())):
        with replacing(f"{stem}.{kind}") as new:
            new.write_bytes(data)


def as_html(content: dict[str, Any], svg: str) -> str:
    """One self-contained page.

    Args:
        content: The content of the report.
        svg: The picture.
    """
    parts = [part for workload in content["workloads"] for part in _workload_html(workload)]
    body = (
        f"<h1>Does it help?</h1><p>Made by</p><pre>{html.escape(content['command'])}</pre>"
        + svg[svg.index("<svg") :]
        + "\n".join(parts)
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>curation compare</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _workload_html(workload: dict[str, Any]) -> list[str]:
    """The verdicts, the table of arms, the notes and the table of runs."""
    parts = [f"<h2>{html.escape(workload['name'])}</h2><ul>"]
    parts += [f'<li class="{kind}">{html.escape(text)}</li>' for kind, text in verdicts(workload)]
    parts.append(f'</ul><div class="wide"><table>{_row("th", ["arm", *COLUMNS])}')
    for arm in workload["arms"]:
        parts.append(_row("td", _cells(workload, arm)))
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes(workload))
    parts.append(f"</table></div><ul>{items}</ul>")
    parts += _settings_html(workload)
    if "sweep" in workload:
        parts += _sweep_html(workload)
    is_open = " open" if failed(workload) else ""
    head = _row("th", ["arm", "seed", "final", "steps", "seconds", ""])
    parts.append(f"<details{is_open}><summary>Every run</summary><table>{head}")
    for run in workload["runs"]:
        last = run["points"][-1] if run["points"] else {"step": 0, "seconds": 0.0}
        cells = [run["arm"], run["seed"], number(final_value(run)), last["step"], number(last["seconds"])]
        error = f'<td class="failed">{html.escape(run["error"] or "")}</td>'
        parts.append(_row("td", cells, error))
    return [*parts, "</table></details>"]


def _settings_html(workload: dict[str, Any]) -> list[str]:
    """What each arm changes in the recipe, side by side; reports of earlier versions have no settings."""
    settings: dict[str, dict[str, Any]] = workload.get("settings") or {}
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    if not names:
        return []
    parts = [f'<h3>Settings</h3><div class="wide"><table>{_row("th", ["", *settings])}']
    rows = [_row("td", [name, *(values.get(name, "-") for values in settings.values())]) for name in names]
    return [*parts, *rows, "</table></div>"]


def _sweep_html(workload: dict[str, Any]) -> list[str]:
    """The cost ratios at equal quality: sentences, a table of all metrics, and the runs with other budgets."""
    items = "".join(
        f'<li class="{kind}">{html.escape(text)}</li>' for kind, text in equal_quality.sentences(workload)
    )
    head, sweep = _row("th", RATIOS), workload["sweep"]
    table = "".join(_row("td", cells) for cells in equal_quality.rows(workload))
    parts = [f'<h3>Cost at equal quality</h3><ul>{items}</ul><div class="wide"><table>{head}{table}</table></div>']
    parts.append(f"<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in equal_quality.notes(workload))}</ul>")
    is_open = " open" if equal_quality.failed_runs(workload) else ""
    head = _row("th", ["arm", "seed", "of the budget", *sweep["metrics"], "steps", "seconds", "FLOPs", ""])
    parts.append(f"<details{is_open}><summary>Every run of the sweep</summary><table>{head}")
    for run in sweep["runs"]:
        values = [run["metrics"].get(name) for name in sweep["metrics"]]
        cells = [run["arm"], run["seed"], f"{run['share']:g}", *("-" if v is None else number(v) for v in values)]
        cells += [run["step"], number(run["seconds"]), number(run["flops"])]
        parts.append(_row("td", cells, f'<td class="failed">{html.escape(run["error"] or "")}</td>'))
    return [*parts, "</table></details>"]


def failed(workload: dict[str, Any]) -> bool:
    """Whether a run failed or diverged, of the sweep too."""
    return any(failures(workload, arm) for arm in workload["arms"]) or bool(equal_quality.failed_runs(workload))


def _cells(workload: dict[str, Any], arm: str) -> list[str]:
    """The name of an arm and its cells of the table."""
    return [arm, *(cell(workload["summary"][arm]) for cell in COLUMNS.values())]


def _row(tag: str, cells: list[Any], more: str = "") -> str:
    """A row of a table; ``more`` are further cells in HTML."""
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + more + "</tr>"


def as_json(content: dict[str, Any]) -> str:
    """The report, a run a line; numbers that are not finite are null."""
    workloads = []
    for workload in content["workloads"]:
        rest = {key: value for key, value in workload.items() if key not in ("runs", "sweep")}
        text = f'{json.dumps(_finite(rest), indent=1)[:-2]},\n "runs": {_lines(workload["runs"])}'
        if "sweep" in workload:
            sweep = {key: value for key, value in workload["sweep"].items() if key != "runs"}
            text += f',\n "sweep": {json.dumps(_finite(sweep))[:-1]}, "runs": {_lines(workload["sweep"]["runs"])}}}'
        workloads.append(text + "\n}")
    return f'{{"command": {json.dumps(content["command"])}, "workloads": [\n' + ",\n".join(workloads) + "\n]}\n"


def _lines(runs: list[dict[str, Any]]) -> str:
    """A list in JSON, a run a line."""
    return "[\n  " + ",\n  ".join(json.dumps(_finite(run)) for run in runs) + "\n ]"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(content: dict[str, Any], stem: Path) -> None:
    """Print the table and the verdicts.

    Args:
        content: The content of the report.
        stem: Path of the report's files without the suffix.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names are shown as they are
    for workload in content["workloads"]:
        title = f"{workload['name']}: {workload['metric']}"
        table = Table(box=SIMPLE, collapse_padding=True, pad_edge=False, title=title)
        table.add_column("arm", no_wrap=True)
        columns = [*list(COLUMNS)[:2], "seconds"]
        for name in columns:
            table.add_column(name, no_wrap=True, justify="right")
        for arm in workload["arms"]:
            table.add_row(arm, *(COLUMNS[name](workload["summary"][arm]) for name in columns))
        console.print(table)
        lines = [text for _, text in [*verdicts(workload), *equal_quality.sentences(workload)]]
        lines += [f"{r['arm']}, seed {r['seed']} failed: {r['error']}" for r in workload["runs"] if r["error"]]
        lines += equal_quality.failed_runs(workload)
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False)
    console.print(f"Report: {stem}.html", soft_wrap=True, highlight=False)


def log_to_wandb(content: dict[str, Any], stem: Path, project: str | None, group: str) -> None:
    """Log the picture, the page and the table to W&B, as one more run of the group.

    Args:
        content: The content of the report.
        stem: Path of the report's files without the suffix.
        project: The W&B project.
        group: The W&B group of the comparison.
    """
    import wandb
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

    try:
        # absolute: a W&B service that this process shares with its parent has the parent's working directory
        folder = str(stem.parent.absolute())
        run = wandb.init(
            project=project, group=group, name="report", job_type="report", dir=folder, reinit="create_new"
        )
    except wandb.Error as error:
        rank_zero_warn(f"The report was not logged to W&B: {error}")
        return
    rows = [
        [workload["name"], *_cells(workload, arm), verdict(workload, arm)[1]]
        for workload in content["workloads"]
        for arm in workload["arms"]
    ]
    logged = {
        "compare/report": wandb.Html(Path(f"{stem}.html").read_text(encoding="utf-8"), inject=False),
        "compare/curves": wandb.Image(f"{stem}.png"),
        "compare/arms": wandb.Table(columns=["workload", "arm", *COLUMNS, "verdict"], data=rows),
    }
    swept = [workload for workload in content["workloads"] if "sweep" in workload]
    if swept:
        rows = [[workload["name"], *cells] for workload in swept for cells in equal_quality.rows(workload)]
        logged["compare/cost_ratio"] = wandb.Table(columns=["workload", *RATIOS], data=rows)
    run.log(logged)
    run.finish()
