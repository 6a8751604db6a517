"""``curation ledger FOLDER``: what a selection has never kept, kept most, and when; as text and as a picture."""

import argparse
from pathlib import Path

import numpy as np

from curation.records.ledger import Ledger


def picture(counts: tuple[np.ndarray, np.ndarray, np.ndarray], file: Path) -> None:
    """How often samples were kept, beside what chance would give, and how long ago (PNG).

    Args:
        counts: Of :meth:`curation.records.ledger.Ledger.counts`.
        file: To write.
    """
    import matplotlib.pyplot as plt

    seen, kept, last = counts
    end = last.max()
    figure, (repeats, age) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    bins = _whole(kept.max())
    repeats.hist(kept, bins=bins, label="this selection")
    chance = np.random.default_rng(0).binomial(seen, kept.sum() / seen.sum())
    repeats.hist(chance, bins=bins, histtype="step", color="black", label="chance, at the same rate")
    repeats.set(xlabel="times kept", ylabel="samples", title=f"never kept: {(kept == 0).mean():.1%}")
    repeats.legend(frameon=False)
    age.hist(end - last[last >= 0], bins=_whole(end))
    age.set(xlabel="steps since last kept", ylabel="samples", title="age, of those that were kept")
    for axes in (repeats, age):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _whole(largest: int) -> np.ndarray:
    """Edges of at most 60 bins that hold equally many whole numbers each."""
    width = -(-(int(largest) + 1) // 60)
    return np.arange(0, largest + width + 1, width) - 0.5


def main(args: list[str]) -> None:
    """``curation ledger FOLDER [--sample ID] [--size N] [--picture FILE]``.

    Raises:
        ValueError: If ``--size`` or ``--sample`` is out of range.
        OSError: If the folder holds no ledger, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser("curation ledger", description="What a selection kept, and what it never did.")
    parser.add_argument("folder", help="of a SelectionLedger")
    parser.add_argument("--size", type=int, help="samples of the data set (default: the largest id and one)")
    parser.add_argument("--sample", type=int, metavar="ID", help="print every row of this sample")
    parser.add_argument("--picture", metavar="FILE", help="draw how often and how long ago samples were kept (PNG)")
    options = parser.parse_args(args)
    if options.size is not None and options.size < 1:
        raise ValueError(f"Argument `--size` must be >= 1, but got {options.size}.")
    ledger = Ledger(options.folder)
    if options.sample is not None:
        history = ledger.history(options.sample)
        if not len(history["step"]):
            raise ValueError(
                f"Argument `--sample` must be an id in the ledger, but {options.sample} never was a candidate."
            )
        print(f"{'step':>9} {'score':>11} kept weight")
        for row in zip(*(history[name] for name in ("step", "score", "kept", "weight")), strict=True):
            print("{:>9} {:>11.4f} {:>4} {:>6.3f}".format(*row))
        return
    counts = seen, kept, _ = ledger.counts(options.size)
    never = np.flatnonzero(kept == 0)
    print(f"{len(seen):,} samples, {int(seen.sum()):,} candidates, {int(kept.sum()):,} kept")
    print(f"never kept: {len(never):,} ({len(never) / len(seen):.1%}), such as {never[:10].tolist()}")
    most = np.argsort(-kept, kind="stable")[:10]
    print("kept most:  " + ", ".join(f"{i} ({kept[i]} times)" for i in most))
    for rank, step in ledger.cut_off().items():
        print(f"{rank} did not close its files (killed, or still running): rows after step {step} may be missing")
    if options.picture is not None:
        picture(counts, Path(options.picture))
        print(f"picture: {options.picture}")
