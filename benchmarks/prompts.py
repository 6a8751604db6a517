r"""Which prompts are answered: what it costs to be as good as uniform sampling, in generated tokens.

    curation compare rollouts_tiny --methods=dynamic,signal,streaks,thompson --metric=val_pass_at_1 --mode=max \
        --data.seen=0
    python benchmarks/prompts.py runs/compare/rollouts_tiny/rollouts_tiny    # one line of JSON an arm

Every arm has one run a seed, at a constant learning rate; a budget is a validation of it, and the quality that is
read is that of uniform sampling after the last step. Costs are those of ``curation.evaluation.cost_ratio``.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from curation.evaluation.cost_ratio import cost_ratio
from curation.evaluation.statistics import paired_interval

TOKENS, METRICS = "rollouts/tokens_total", ("val_pass_at_1", "val_pass_at_32", "val_hard_pass_at_32")


def runs(folder: Path) -> dict[str, dict[int, list[dict]]]:
    """The validations of every finished run, by arm and seed."""
    found: dict[str, dict[int, list[dict]]] = {}
    for file in sorted(folder.glob("*-*/run.json")):
        run, (arm, _, seed) = json.loads(file.read_text()), file.parent.name.rpartition("-")
        if run["finished"]:
            found.setdefault(arm, {})[int(seed)] = [point for point in run["points"] if TOKENS in point["metrics"]]
    return found


def main() -> None:
    """Print the cost ratio of every arm, and its last metrics minus those of uniform sampling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metric", default=METRICS[0])
    options = parser.parse_args()
    arms = runs(options.folder)
    for arm, of_arm in arms.items():
        seeds = sorted(of_arm.keys() & arms["uniform"].keys())
        values, costs = (
            [np.array([[point["metrics"][name] for point in arms[a][s]] for s in seeds]) for a in ("uniform", arm)]
            for name in (options.metric, TOKENS)
        )
        line = {"arm": arm, "seeds": len(seeds), "tokens": round(costs[1][:, -1].mean() / costs[0][:, -1].mean(), 3)}
        if len(seeds) > 1:
            ratio = cost_ratio(costs[0], values[0], costs[1], values[1], "max", read=values[0].shape[1] - 1)
            line["cost_ratio"] = [f"{ratio.bound}{ratio.ratio:.2f}", round(ratio.low, 2), round(ratio.high, 2)]
            line["plateau"] = ratio.plateau
        for name in METRICS:
            last = {a: [arms[a][s][-1]["metrics"].get(name, np.nan) for s in seeds] for a in ("uniform", arm)}
            differences = np.subtract(last[arm], last["uniform"]).tolist()
            of = paired_interval(differences) if len(seeds) > 1 else differences
            line[name] = [round(float(np.mean(last[arm])), 3), *(round(float(x), 3) for x in of)]
        print(json.dumps(line))


if __name__ == "__main__":
    main()
