"""``curation ledger FOLDER``: what a selection has never kept, kept most, and when; as text and as a picture."""

import argparse

import numpy as np

from curation.checks import check_integer
from curation.recipes.ledger_picture import draw_ledger
from curation.recipes.pictures import save_picture
from curation.records.ledger import Ledger


def main(args: list[str]) -> None:
    """``curation ledger FOLDER [--sample ID] [--size N] [--picture FILE]``.

    Raises:
        ValueError: If ``--size`` or ``--sample`` is out of range.
        OSError: If the folder holds no ledger, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser("curation ledger", description="What a selection kept, and what it never did.")
    parser.add_argument("folder", help="folder that a SelectionLedger has written")
    parser.add_argument("--size", type=int, help="samples of the data set (default: the largest id and one)")
    parser.add_argument("--sample", type=int, metavar="ID", help="print every row of this sample")
    parser.add_argument("--picture", metavar="FILE", help="draw how often and how long ago samples were kept (PNG)")
    options = parser.parse_args(args)
    check_integer("--size", options.size, 1, optional=True)
    ledger = Ledger(options.folder)
    if options.sample is not None:
        print(history_table(ledger, options.sample))
        return
    seen, kept, last = ledger.counts(options.size)
    print(summary(ledger, seen, kept))
    if options.picture is not None:
        save_picture(draw_ledger(seen, kept, last), options.picture)
        print(f"picture: {options.picture}")


def history_table(ledger: Ledger, sample: int) -> str:
    """Every row of a sample, a line each.

    Raises:
        ValueError: If the sample never was a candidate.
    """
    history = ledger.history(sample)
    if not len(history["step"]):
        raise ValueError(f"Argument `--sample` must be an id in the ledger, but {sample} never was a candidate.")
    rows = zip(*(history[name] for name in ("step", "score", "kept", "weight")), strict=True)
    lines = ["{:>9} {:>11.4f} {:>4} {:>6.3f}".format(*row) for row in rows]
    return "\n".join([f"{'step':>9} {'score':>11} kept weight", *lines])


def summary(ledger: Ledger, seen: np.ndarray, kept: np.ndarray) -> str:
    """How many samples were kept and how often, and whether the ledger is whole.

    Args:
        ledger: The ledger.
        seen: Times that each sample was a candidate, int64 ``[N]``.
        kept: Times that it was kept, int64 ``[N]``.
    """
    never = np.flatnonzero(kept == 0)
    most = np.argsort(-kept, kind="stable")[:10]
    open_files = [
        f"{rank} did not close its files (killed, or still running): rows after step {step} may be missing"
        for rank, step in ledger.cut_off().items()
    ]
    return "\n".join(
        [
            f"{len(seen):,} samples, {int(seen.sum()):,} candidates, {int(kept.sum()):,} kept",
            f"never kept: {len(never):,} ({len(never) / len(seen):.1%}), such as {never[:10].tolist()}",
            "kept most:  " + ", ".join(f"{i} ({kept[i]} times)" for i in most),
            *open_files,
        ]
    )
