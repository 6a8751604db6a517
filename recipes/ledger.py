"""``curation ledger FOLDER``: what a selection has never kept, kept most, and when; as text and as a picture."""

import argparse
from pathlib import Path

import numpy as np

from curation.records.ledger import Ledger


def picture(ledger: Ledger, file: Path, size: int | None = None) -> None:
    """How often samples were kept, beside what chance would give, and how long ago (PNG).

    Args:
        ledger: To draw.
        file: To write.
        size: Number of samples of the data set; None for the largest id and one.
    """
    import matplotlib.pyplot as plt

    seen, kept, last = ledger.counts(size)
    end = last.max()
    figure, (repeats, age) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    bins = np.arange(kept.max() + 2) - 0.5
    if len(bins) > 60:
        bins = np.linspace(-0.5, kept.max() + 0.5, 60)
    repeats.hist(kept, bins=bins, label="this selection")
    chance = np.random.default_rng(0).binomial(seen, kept.sum() / seen.sum())
    repeats.hist(chance, bins=bins, histtype="step", color="black", label="chance, at the same rate")
    repeats.set(xlabel="times kept", ylabel="samples", title=f"never kept: {(kept == 0).mean():.1%}")
    repeats.legend(frameon=False)
    age.hist(end - last[last >= 0], bins=50)
    age.set(xlabel="steps since last kept", ylabel="samples", title="age, of those that were kept")
    for axes in (repeats, age):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(args: list[str]) -> None:
    """``curation ledger FOLDER [--sample ID] [--size N] [--picture FILE]``.

    Raises:
        OSError: If the folder holds no ledger, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser("curation ledger", description="What a selection kept, and what it never did.")
    parser.add_argument("folder", help="of a SelectionLedger")
    parser.add_argument("--size", type=int, help="samples of the data set (default: the largest id and one)")
    parser.add_argument("--sample", type=int, metavar="ID", help="print every row of this sample")
    parser.add_argument("--picture", metavar="FILE", help="draw how often and how long ago samples were kept (PNG)")
    options = parser.parse_args(args)
    ledger = Ledger(options.folder)
    if options.sample is not None:
        history = ledger.history(options.sample)
        print(f"{'step':>9} {'score':>11} kept weight")
        for row in zip(*(history[name] for name in ("step", "score", "kept", "weight")), strict=True):
            print("{:>9} {:>11.4f} {:>4} {:>6.3f}".format(*row))
        return
    seen, kept, _ = ledger.counts(options.size)
    never = np.flatnonzero(kept == 0)
    print(f"{len(seen):,} samples, {int(seen.sum()):,} candidates, {int(kept.sum()):,} kept")
    print(f"never kept: {len(never):,} ({len(never) / len(seen):.1%}), such as {never[:10].tolist()}")
    print("kept most:  " + ", ".join(f"{i} ({n} times)" for i, n in ledger.most_kept(10)))
    for rank, step in ledger.cut_off().items():
        print(f"{rank} did not close its files (killed, or still running): rows after step {step} may be missing")
    if options.picture is not None:
        picture(ledger, Path(options.picture), options.size)
        print(f"picture: {options.picture}")
