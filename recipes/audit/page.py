"""The page of an audit: the samples to look at, as they are, and safe for any text."""

import base64
import html
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from curation.recipes.audit.audit import Audit
from curation.recipes.pictures import picture

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;max-width:40rem;max-height:16rem;overflow:auto}
img.sample{height:64px;image-rendering:pixelated}img.picture{width:100%}h2{margin-top:2.5rem}"""
LONGEST, NUMBERS = 2000, 12  # characters and numbers of a sample that are shown
MOST = 30  # rows of the tables of pairs and parts


def as_page(audit: Audit, figure: Any, title: str, dataset: Any = None, rows: int = 50, tokenizer: Any = None) -> str:
    """One self-contained HTML page.

    Every text of the data is escaped, and a policy in the page forbids scripts and anything from elsewhere.

    Args:
        audit: The audit.
        figure: :func:`~curation.recipes.audit.pictures.draw_audit` of it.
        title: The first line of the page.
        dataset: Map-style data set, whose samples are shown; None for none.
        rows: Suspects to show.
        tokenizer: Decodes ``input_ids``; None leaves numbers.
    """

    def shown(sample_id: int) -> str:
        return "" if dataset is None else sample_html(dataset[sample_id], tokenizer)

    columns = audit.table()
    named = [name for name in ("sample_id", "label", "suggested", "score", "visits", "right") if name in columns]
    top = range(min(rows, len(audit.order)))
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in audit.summary())}</ul>",
        f'<img class="picture" alt="map of the data, histogram" src="{_data_uri(picture(figure, "png"))}">',
        "<h2>The most suspicious labels</h2>",
        _table(
            [*named, "sample"],
            ([*(_cell(columns[name][i]) for name in named), shown(int(columns["sample_id"][i]))] for i in top),
        ),
    ]
    if audit.pairs is not None and len(audit.pairs):
        label = audit.dynamics["label"]
        pairs = (
            [_cell(i), _cell(label[i]), shown(i), _cell(j), _cell(label[j]), shown(j)]
            for i, j in audit.pairs[:MOST].tolist()
        )
        body += ["<h2>Near-duplicates with different labels</h2>", _table(["sample", "label", ""] * 2, pairs)]
    if audit.slices:
        names = list(audit.slices[0])
        parts = ([_cell(part[name]) for name in names] for part in audit.slices[:MOST])
        body += ["<h2>The hardest parts of the data</h2>", _table(names, parts)]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(head: list[str], rows: Any) -> str:
    cells = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    return html.escape(f"{value:.3f}" if isinstance(value, float) else str(value))


def sample_html(sample: Any, tokenizer: Any = None) -> str:
    """A sample as escaped HTML: its image, its texts, or its first numbers.

    Args:
        sample: A mapping or a tuple, of which a label is not shown again.
        tokenizer: Decodes ``input_ids``.

    Example:
        >>> sample_html({"text": "<script>alert(1)</script>", "label": 0})
        '<pre>&lt;script&gt;alert(1)&lt;/script&gt;</pre>'
    """
    if isinstance(sample, Mapping):
        if tokenizer is not None and "input_ids" in sample:
            return _text(tokenizer.decode(sample["input_ids"], skip_special_tokens=True))
        parts = [value for name, value in sample.items() if name not in ("label", "labels", "y", "sample_id")]
        texts = [value for value in parts if isinstance(value, str)]
        return "".join(map(_text, texts)) if texts else "".join(map(_value, parts[:1]))
    return _value(sample[0] if isinstance(sample, (tuple, list)) and len(sample) else sample)


def _text(text: str) -> str:
    cut = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    return f"<pre>{html.escape(cut)}</pre>"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else None
    if array is None:
        try:
            array = np.asarray(value)
        except ValueError:  # ragged
            return _text(repr(value))
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.dtype.kind in "iufb" and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3))):
        return f'<img class="sample" alt="" src="{_data_uri(_png(array))}">'
    if array.dtype.kind in "iufb":
        numbers = array.reshape(-1)
        more = " …" if len(numbers) > NUMBERS else ""
        return _text(" ".join(f"{number:.4g}" for number in numbers[:NUMBERS].tolist()) + more)
    return _text(repr(value))


def _png(array: np.ndarray) -> bytes:
    """An image ``[H, W]`` or ``[H, W, C]`` of any range as PNG."""
    import matplotlib.image

    array = array.astype(np.float64)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    low, high = array.min(), array.max()
    file = io.BytesIO()
    matplotlib.image.imsave(file, (array - low) / max(high - low, 1e-12), cmap="gray", vmin=0, vmax=1, format="png")
    return file.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
