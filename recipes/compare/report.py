"""What a comparison found: plain sentences, tables and curves; ``curation report FILE`` makes them from the JSON."""

import argparse
import html
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.evaluation.statistics import paired_interval, time_to_target
from curation.recipes.compare.pictures import BASE, axis, draw, picture

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:86rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}.wide{overflow-x:auto}
th:first-child,td:first-child{text-align:left}svg{width:100%;height:auto}
code,pre{background:#f4f4f4;padding:.1rem .3rem;white-space:pre-wrap;overflow-wrap:anywhere}
h2{margin-top:2.5rem}.won{color:#136f2d}.lost{color:#a11}.failed{color:#a11;font-weight:600}details{margin:1rem 0}"""


def build(command: str, workloads: list[dict[str, Any]]) -> dict[str, Any]:
    """A report: the runs of every workload with what follows from them.

    Args:
        command: That made the runs.
        workloads: Of ``curation compare``: the runs, and how they were made.
    """
    for w in workloads:
        for point in (point for run in w["runs"] for point in run["points"]):
            point["value"] = math.nan if point["value"] is None else point["value"]
        w["summary"] = summarise(w)
    return {"command": command, "workloads": workloads}


def final(run: dict[str, Any]) -> float:
    """The metric of the last weights; NaN if there are none."""
    return math.nan if run["error"] else run["points"][-1]["value"]


def reached(run: dict[str, Any], target: float, mode: Any) -> float:
    """Training seconds to the target; infinite for a miss, and for a run that failed or ended at NaN."""
    if not math.isfinite(final(run)):
        return math.inf
    return time_to_target(axis(run, "seconds"), [point["value"] for point in run["points"]], target, mode)


def summarise(w: dict[str, Any]) -> dict[str, Any]:
    """For every arm: the final metric, its paired differences, the time to the target, and the cost."""
    runs = {arm: {run["seed"]: run for run in w["runs"] if run["arm"] == arm} for arm in w["arms"]}
    finals = {
        arm: {s: final(run) for s, run in own.items() if math.isfinite(final(run))} for arm, own in runs.items()
    }
    better, worse = (min, max) if w["mode"] == "min" else (max, min)
    best = [better(p["value"] for p in runs[BASE][s]["points"] if math.isfinite(p["value"])) for s in finals[BASE]]
    target = w["target"] if w["target"] is not None else worse(best, default=math.nan)
    times = {arm: statistics.median(reached(r, target, w["mode"]) for r in own.values()) for arm, own in runs.items()}

    def minus(arm: str, other: str) -> list[float]:
        return [value - finals[other][s] for s, value in finals[arm].items() if s in finals.get(other, {})]

    summary: dict[str, Any] = {"target": target, "hours": sum(r["wall_seconds"] or 0 for r in w["runs"]) / 3600}
    for arm, own in runs.items():
        good = finals[arm]
        lasts = [own[seed]["points"][-1] for seed in good]
        cost = {
            name: statistics.mean(last[key] for last in lasts) if lasts else math.nan
            for name, key in (("steps", "step"), *((k, k) for k in ("samples_trained", "samples_scored", "seconds")))
        }
        differences, to_full = minus(arm, BASE), minus(arm, "full")
        summary[arm] = {
            "runs": len(own),
            "failed": sum(run["error"] is not None for run in own.values()),
            "diverged": sum(run["error"] is None and not math.isfinite(final(run)) for run in own.values()),
            "final": statistics.mean(good.values()) if good else math.nan,
            "deviation": statistics.stdev(good.values()) if len(good) > 1 else math.nan,
            "pairs": len(differences),
            "difference": paired_interval(differences) if len(differences) > 1 and arm != BASE else None,
            "minus_full": paired_interval(to_full) if len(to_full) > 1 and arm != "full" else None,
            "time_to_target": times[arm],
            **cost,
            "flops": cost["steps"] * next(run["flops_per_step"] for run in own.values()),
            "peak_memory": max(run["peak_memory"] or 0 for run in own.values()),
        }
    return summary


def number(value: float) -> str:
    """Four digits; thousands and millions by name."""
    if not math.isfinite(value):
        return "never" if value == math.inf else "-"
    for power, name in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10 ** (power + (1 if power == 3 else 0)):
            return f"{value / 10**power:.4g} {name}"
    return f"{value:.4g}"


def signed(value: float, width: float) -> str:
    """A difference, as exact as its interval is wide."""
    digits = max(0, 1 - math.floor(math.log10(width))) if width > 0 else 4
    return f"{value:+.{min(digits, 8)}f}"


def interval(difference: tuple[float, float, float]) -> str:
    """``+0.020 [-0.001, +0.041]``."""
    mean, low, high = difference
    width = (high - low) / 2
    return f"{signed(mean, width)} [{signed(low, width)}, {signed(high, width)}]"


def broken(w: dict[str, Any], arm: str) -> str:
    """How many runs of an arm failed or diverged; empty if none did."""
    own = w["summary"][arm]
    return ", ".join(f"{own[how]} of {own['runs']} runs of {arm} {how}" for how in ("failed", "diverged") if own[how])


def time_ratio(w: dict[str, Any], arm: str) -> float:
    """Median time to the target over that of ``uniform``; NaN where neither reaches it in most seeds."""
    own, base = (w["summary"][name]["time_to_target"] for name in (arm, BASE))
    return math.nan if own == base == math.inf else own / base


def verdict(w: dict[str, Any], arm: str) -> tuple[str, str]:
    """``"won"``, ``"lost"``, ``"even"`` or ``"failed"``, and a sentence that says so."""
    own, target = w["summary"][arm], number(w["summary"]["target"])
    why = ", ".join(filter(None, (broken(w, name) for name in dict.fromkeys((arm, BASE)))))
    if own["difference"] is None or why:
        found = "" if math.isnan(own["final"]) else f" {w['metric']} {number(own['final'])}"
        if own["difference"] is not None:
            found += f", minus {BASE} {interval(own['difference'])} over the {own['pairs']} pairs that are left"
        said = f"{arm}: no verdict, {why or 'one seed says nothing about a difference'}."
        return "failed" if why else "even", said + (f"{found}." if found else "")
    mean, low, high = own["difference"]
    gain = mean if w["mode"] == "max" else -mean
    said = f"{interval(own['difference'])}, {own['pairs']} paired seeds"
    if low <= 0 <= high:
        kind, text = "even", f"no detectable difference to {BASE} in {w['metric']}: {said}"
    else:
        kind = "won" if gain > 0 else "lost"
        text = f"{kind} against {BASE}: {w['metric']} {said}"
    if own["minus_full"] is not None:
        text += f"; minus full {interval(own['minus_full'])}"
    ratio = time_ratio(w, arm)
    if ratio == math.inf:
        text += f". It does not reach {target} in most seeds"
    elif ratio == 0:
        text += f". It reaches {target}, {BASE} does not in most seeds"
    elif math.isfinite(ratio):
        text += f". Time to {target}: {ratio:.2f} times that of {BASE}"
    return kind, f"{arm}: {text}."


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {  # of the summary of an arm
    "final": lambda own: (
        number(own["final"]) + ("" if math.isnan(own["deviation"]) else f" ± {own['deviation']:.2g}")
    ),
    "minus uniform, 95 %": lambda own: interval(own["difference"]) if own["difference"] else "",
    "minus full, 95 %": lambda own: interval(own["minus_full"]) if own["minus_full"] else "",
    "seconds to target": lambda own: number(own["time_to_target"]),
    "steps": lambda own: number(own["steps"]),
    "trained on": lambda own: number(own["samples_trained"]),
    "scored": lambda own: number(own["samples_scored"]),
    "FLOPs": lambda own: number(own["flops"]),
    "seconds": lambda own: number(own["seconds"]),
    "peak memory": lambda own: f"{own['peak_memory'] / 2**20:.0f} MiB",
}


def notes(w: dict[str, Any]) -> list[str]:
    """What a reader must know to read the figures right."""
    unit, amount = w["budget"]["unit"], w["budget"]["amount"]
    seeds = len({run["seed"] for run in w["runs"]})
    compared = sum(w["summary"][arm]["difference"] is not None for arm in w["arms"])
    places = sorted({f"{run['device']}, torch {run['torch']}" for run in w["runs"] if run["device"]})
    estimated = ", by the cost of an arm's first steps" if unit in ("samples", "flops") else ""
    return [
        f"Every run had {number(amount)} {unit}{estimated}; {seeds} seed{'s' * (seeds > 1)}; {'; '.join(places)}; "
        f"{_duration(w['summary']['hours'])} of runs, {w['jobs']} side by side.",
        "Intervals are 95 % Student t intervals of differences between runs with the same seed, not corrected for "
        f"{compared} comparisons. What lies outside an interval is ruled out, at that confidence.",
        f"The target, {number(w['summary']['target'])}, is "
        + (f"what {BASE} reaches with every seed" if w["target"] is None else "the one asked for")
        + "; the time is the median over seeds of the first evaluation that reaches it, so it is as coarse as they "
        "are far apart.",
        "FLOPs: matrix products, convolutions and attention, counted by torch in the first steps of each arm.",
        *(["Seconds are those of runs beside each other."] if w["jobs"] > 1 else []),
    ]


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def as_html(content: dict[str, Any], svg: str) -> str:
    """One self-contained page."""
    parts = [f"<h1>Does it help?</h1><p>Made by</p><pre>{html.escape(content['command'])}</pre>"]
    for w in content["workloads"]:
        said = [verdict(w, arm) for arm in w["arms"] if arm != BASE or broken(w, BASE)]
        parts.append(f"<h2>{html.escape(w['name'])}</h2><ul>")
        parts += [f'<li class="{kind}">{html.escape(text)}</li>' for kind, text in said]
        parts.append(
            '</ul><div class="wide"><table><tr><th>arm</th>'
            + "".join(f"<th>{name}</th>" for name in COLUMNS)
            + "</tr>"
        )
        for arm in w["arms"]:
            cells = "".join(f"<td>{html.escape(show(w['summary'][arm]))}</td>" for show in COLUMNS.values())
            parts.append(f"<tr><td>{html.escape(arm)}</td>{cells}</tr>")
        parts.append("</table></div><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes(w)) + "</ul>")
        is_open = " open" if any(broken(w, arm) for arm in w["arms"]) else ""
        head = "".join(f"<th>{name}</th>" for name in ("arm", "seed", "final", "steps", "seconds", ""))
        parts.append(f"<details{is_open}><summary>Every run</summary><table><tr>{head}</tr>")
        for run in w["runs"]:
            last = run["points"][-1] if run["points"] else {"step": 0, "seconds": 0.0}
            row = [run["arm"], run["seed"], number(final(run)), last["step"], number(last["seconds"])]
            parts.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
                         + f'<td class="failed">{html.escape(run["error"] or "")}</td></tr>')  # fmt: skip
        parts.append("</table></details>")
    body = "\n".join(parts[:1]) + svg[svg.index("<svg") :] + "\n".join(parts[1:])
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>curation compare</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def write(content: dict[str, Any], stem: Path) -> None:
    """``stem`` with .json, .html, .png and .svg.

    Raises:
        OSError: If one cannot be written.
    """
    figure = draw(content)
    svg, png = picture(figure, "svg"), picture(figure, "png")
    for kind, made in (("json", as_json(content).encode()), ("svg", svg), ("png", png),
                       ("html", as_html(content, svg.decode()).encode())):  # fmt: skip
        Path(f"{stem}.{kind}").write_bytes(made)


def as_json(content: dict[str, Any]) -> str:
    """The report, a run a line; what is not finite is null."""
    workloads = []
    for w in content["workloads"]:
        runs = ",\n  ".join(json.dumps(_finite(run)) for run in w["runs"])
        rest = json.dumps(_finite({key: value for key, value in w.items() if key != "runs"}), indent=1)
        workloads.append(f'{rest[:-2]},\n "runs": [\n  {runs}\n ]\n}}')
    return f'{{"command": {json.dumps(content["command"])}, "workloads": [\n' + ",\n".join(workloads) + "\n]}\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(content: dict[str, Any], stem: Path) -> None:
    """Print the sentences and the table."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for w in content["workloads"]:
        table = Table(box=SIMPLE, collapse_padding=True, pad_edge=False, title=f"{w['name']}: {w['metric']}")
        for name in ("arm", *list(COLUMNS)[:2], "seconds"):
            table.add_column(name, no_wrap=True, justify="left" if name == "arm" else "right")
        for arm in w["arms"]:
            shown = {name: cell(w["summary"][arm]) for name, cell in COLUMNS.items()}
            table.add_row(arm, *list(shown.values())[:2], shown["seconds"])
        console.print(table)
        for arm in w["arms"]:
            if arm != BASE or broken(w, BASE):
                console.print(verdict(w, arm)[1], soft_wrap=True, highlight=False, markup=False)
        for run in w["runs"]:
            if run["error"]:
                console.print(
                    f"{run['arm']}, seed {run['seed']} failed: {run['error']}", soft_wrap=True, markup=False
                )
    console.print(f"Report: {stem}.html", soft_wrap=True, highlight=False)


def log_to_wandb(content: dict[str, Any], stem: Path, project: str | None, group: str) -> None:
    """The picture, the page and the table, as one more run of the group."""
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
    rows = [[w["name"], arm, *(c(w["summary"][arm]) for c in COLUMNS.values()), verdict(w, arm)[1]]
            for w in content["workloads"] for arm in w["arms"]]  # fmt: skip
    run.log(
        {
            "compare/report": wandb.Html(Path(f"{stem}.html").read_text(encoding="utf-8"), inject=False),
            "compare/curves": wandb.Image(f"{stem}.png"),
            "compare/arms": wandb.Table(columns=["workload", "arm", *COLUMNS, "verdict"], data=rows),
        }
    )
    run.finish()


def main(args: list[str]) -> None:
    """``curation report FILE.json ...``.

    Raises:
        ValueError: If a file is not the report of a comparison.
        OSError: If one cannot be read or written.
    """
    parser = argparse.ArgumentParser(
        "curation report", description="Make .html, .png and .svg of a comparison anew from its .json."
    )
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args(args).files:
        try:
            content = json.loads(file.read_text())
            content = build(content["command"], content["workloads"])
            draw(content)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is not the report of a comparison ({error!r}).") from error
        write(content, file.with_suffix(""))
        show(content, file.with_suffix(""))
