"""What the site needs beyond plugins: lists as on GitHub, and the list of reports."""

import json
import re
from pathlib import Path
from typing import Any

REPORTS = "<!-- reports -->"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lists that Python-Markdown reads as GitHub does, and the list of reports in its place."""
    if REPORTS in markdown:
        markdown = markdown.replace(REPORTS, reports(Path(config.docs_dir) / "results"))
    return widen_lists(markdown)


def widen_lists(markdown: str) -> str:
    """Indent what belongs to a list item by four spaces a level, and put a blank line before a list.

    CommonMark, which GitHub reads, indents by the width of the marker and lets a list interrupt a paragraph;
    Python-Markdown does neither.
    """
    lines: list[str] = []
    levels: list[int] = []  # columns at which the contents of the open items begin
    loose: list[bool] = []  # whether there is a blank line in them
    fence = None
    for line in markdown.split("\n"):
        text = line.lstrip(" ")
        column = len(line) - len(text)
        if fence is None and text:
            parted = False
            while levels and column < levels[-1]:
                levels.pop()
                parted = loose.pop()
        inside = levels[-1] if levels else 0
        marker = None if fence else re.match(r"([-*+]|\d+[.)]) +(?=\S)", text)
        if marker and column - inside < 4:
            interrupts = not levels and not lines[-1].startswith(" ") and not is_item(lines[-1]) if lines else False
            if (parted or interrupts) and lines[-1].strip():
                lines.append("")
            lines.append(" " * 4 * len(levels) + text)
            levels.append(column + marker.end())
            loose.append(False)
            continue
        if not text and fence is None:
            loose = [True] * len(levels)
        lines.append(" " * (4 * len(levels) + max(0, column - inside)) + text if text else "")
        if opened := re.match(r"(```+|~~~+)", text):
            if fence is None:
                fence = opened[1]
            elif text.strip() == fence:
                fence = None
    return "\n".join(lines)


def is_item(line: str) -> bool:
    """Whether a line begins a list item."""
    return bool(re.match(r" *([-*+]|\d+[.)]) +\S", line))


def reports(folder: Path) -> str:
    """A section for every report and every picture of the results."""
    sections = []
    for picture in sorted(folder.glob("*.png")):
        data = picture.with_suffix(".json")
        command = json.loads(data.read_text()).get("command") if data.exists() else None
        files = [
            f"[{suffix}](results/{picture.stem}.{suffix})"
            for suffix in ("html", "json", "svg")
            if picture.with_suffix(f".{suffix}").exists()
        ]
        made_by = f"```\n{command}\n```" if command else ""
        image = f"![{picture.stem}](results/{picture.name}){{ loading=lazy }}"
        sections += [f"## {picture.stem}", " · ".join(files), made_by, image]
    return "\n\n".join(filter(None, sections))
