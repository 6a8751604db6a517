#!/usr/bin/env bash
# datasets 5.2.0: the state of a stream is dropped without a word where its epoch is not that of the data set.
# `IterableDataset.state_dict()` taken after 5 of 12 rows of epoch 1 says shard, row and epoch. A new process makes the
# data set anew, which begins at epoch 0, and loads the state: iteration then begins at the first row, and no error or
# warning tells. After `set_epoch(1)` the same state resumes at row 6. A resumed training run repeats what it had seen.
# Seen: "first row after the resume: 0; after set_epoch: 12" (12 is the sixth row).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder" venv/bin/python -W error - <<'PYTHON'
import json
from pathlib import Path

import datasets

files = []
for shard in range(4):
    files.append(f"{shard}.jsonl")
    Path(files[-1]).write_text("".join(json.dumps({"row": 10 * shard + i}) + "\n" for i in range(3)))


def stream():
    return datasets.load_dataset("json", data_files=files, split="train", streaming=True)


before = stream()
before.set_epoch(1)
rows = iter(before)
seen = [next(rows)["row"] for _ in range(5)]
state = before.state_dict()
assert state["epoch"] == 1
rest = [row["row"] for row in rows]

resumed = stream()
resumed.load_state_dict(state)
repeated = [row["row"] for row in resumed]
told = stream()
told.set_epoch(1)
told.load_state_dict(state)
right = [row["row"] for row in told]
print(f"first row after the resume: {repeated[0]}; after set_epoch: {right[0]}")
assert right == rest
assert repeated == seen + rest
PYTHON
