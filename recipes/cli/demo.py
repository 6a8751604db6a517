"""A few minutes on two CPU cores: dynamic pruning against training on everything, at four budgets and eight seeds.

``make demo`` is ``curation compare`` on scikit-learn's handwritten digits, shifted at random. Every arm is trained
with its schedule annealed to each budget, and the report says at what share of the time, and of the operations,
pruning reaches the quality of training on everything.
"""

import argparse
from pathlib import Path

from curation.recipes.cli import compare
from curation.recipes.sources import require_extra

RECIPE = "fashion_mnist_pruning"
ARMS = ("full", "proportional")
OPTIONS = [
    "--data.data=digits",
    "--data.holdout=0.3",
    "--data.batch_size=32",
    "--model.lr=1.2e-2",
    "--model.shift=1",
    "--model.mirror=false",
    "--model.strides=false",
    "--trainer.max_epochs=16",
    "--trainer.check_val_every_n_epoch=4",
    "--trainer.logger=false",
]
SWEEP = ["--budget-sweep=0.25,0.5,1,2", f"--sweep-arms={','.join(ARMS)}", "--methods=proportional"]


def main(args: list[str] | None = None) -> None:
    """Compare, and write the report."""
    parser = argparse.ArgumentParser("python -m curation.recipes.cli.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each arm and budget (%(default)s)")
    given = parser.parse_args(args)
    require_extra()
    compare.main(
        [RECIPE, *SWEEP, *OPTIONS, "--metric=val_loss", f"--seeds={given.seeds}", "--jobs=2", f"--out={given.out}"]
    )


if __name__ == "__main__":
    main()
