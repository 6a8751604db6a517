"""Writes docs/strategies.md from what is registered: ``PYTHONPATH=tests python -m contract.strategies``."""

from pathlib import Path

from contract.kinds import KINDS
from contract.registry import CALLBACKS, Entry

PAGE = Path(__file__).parents[2] / "docs/strategies.md"
SUITE = "tests/contract/test_contract.py"
ELSEWHERE = {
    "boundaries": "resumed from the first batch, the last one of an epoch, its validation, an exception",
    "elastic": "a checkpoint of one process resumed by two, and of two by one, inside an epoch",
    "ddp": "DDP, two processes",
    "unequal_ranks": "DDP, two processes with batches of unequal size",
    "fsdp2": "FSDP2 (`ModelParallelStrategy`), two processes",
    "fsdp1": "FSDP1 (`FSDPStrategy`)",
    "deepspeed": "DeepSpeed",
}
HEAD = f"""# Strategies

Every callback is tried in every kind of run below, by one suite that knows nothing of the callbacks (`{SUITE}`);
this page is written from its tables, and a test fails where it differs. Samplers are tried with the callback that
counts their batches: `ConceptAwareSampler` with `ConceptCoverageMonitor`, `DynamicDataPruningSampler` with
`DynamicDataPruning`, `HardBatchSampler` with `HardBatchTraining`, `SubsetSampler` with `InstanceSelection`.

- **yes**: a test trains in that way and checks what was trained on, and that the callback did its work.
- **no**: refused with an error that says why, before the first step (what a `training_step` returns: after it), and
  a test checks that.
- **part**: trains, and a warning says what the callback leaves out; a test checks that.
- **GPU**: the test needs one (`pytest -m gpu`), and has not run yet.

Callbacks of which all of this is the same share a column:

"""
FOOT = f"""
The tests of a cell are `{SUITE}::test_works_in_every_kind_of_run_or_says_why_not[ROW-CALLBACK]`, with the name in the
first column; of checkpoints `test_a_run_goes_on_from_a_checkpoint_at_every_boundary`; of batches of unequal size
`test_ranks_may_have_batches_of_unequal_size`; of another number of processes
`test_another_number_of_processes_goes_on_with_the_same_samples` (the weights are compared in
`tests/callbacks/runs/test_elastic_resume.py`); of two processes `test_two_ranks_select_what_one_process_selects` 
(rows and weights equal to those of one process) and `test_sharded_weights_are_trained_as_whole_ones`; of strategies
that are refused
`test_strategies_that_were_never_tried_are_refused`; of FSDP1 `tests/contract/test_gpu.py::test_trains_under_fsdp1`.
Every callback, of whatever column, is also killed and resumed, with and without workers of the loader
(`test_a_run_killed_mid_epoch_resumes_bit_for_bit`), tried with W&B offline, and on a GPU in fp32, bf16-mixed and
16-mixed (`tests/contract/test_gpu.py`). The suite runs with the versions of `constraints.txt`, and with the oldest
and the newest torch and Lightning that can be installed (`make test-versions`).

What some of them do not do, whatever the run:

- Rows that pack several sequences cannot be scored, and are refused (`tests/test_scoring.py`); `UniformSelection`
  does not look into them.
- `InstanceSelection(layer=...)` is refused under FSDP1; `GlobalBatchLoadBalancing` with `estimator="deferred"` or
  `"prepass"` under FSDP1 and FSDP2, where gradients are not whole, and `"prepass"` with manual optimization.
- `PolicyModule`, of the recipes, is for one device and DDP.
- `AdaptiveBatchSize` needs two batches in a step, and has the kinds of runs above, DDP, FSDP2 and a resume bit for
  bit in its own tests (`tests/callbacks/batch_size`); it refuses what `BatchSizeScheduler` does, and two optimizers.
- Compiled with `aot_eager`. A compiled `LightningModule` must not compile `self.log` (`torch.compiler.disable`):
  Lightning 2.6 itself cannot.
- Tensor and pipeline parallelism are not supported.
"""


def outcome(entry: Entry, kind: str) -> str:
    if entry.refusal(kind):
        return "no"
    if kind in entry.warns:
        return "part"
    return "GPU" if kind == "fsdp1" else "yes"


def table() -> str:
    rows = {kind: how.title for kind, how in KINDS.items()} | ELSEWHERE
    columns: dict[tuple[str, ...], list[str]] = {}
    outcomes = {name: tuple(outcome(entry, kind) for kind in rows) for name, entry in CALLBACKS.items()}
    for name, entry in CALLBACKS.items():
        names = columns.setdefault(outcomes[name], [])
        usual = next(other for other, same in CALLBACKS.items() if same.cls is entry.cls)
        title = entry.cls.__name__ if outcomes[name] == outcomes[usual] else entry.title
        if title not in names:
            names.append(title)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(columns)]
    legend = [
        f"- **{letter}**: {', '.join(f'`{name}`' for name in names)}"
        for letter, names in zip(letters, columns.values(), strict=True)
    ]
    lines = [f"| | kind of run | {' | '.join(letters)} |", "|" + "---|" * (len(letters) + 2)]
    for kind, title, *cells in zip(rows, rows.values(), *columns, strict=True):
        lines.append(f"| `{kind}` | {title} | {' | '.join(cells)} |")
    return "\n".join([*legend, "", *lines, ""])


def page() -> str:
    return HEAD + table() + FOOT


if __name__ == "__main__":
    PAGE.write_text(page())
