#!/usr/bin/env bash
# pyarrow 26.0.1: a filter on a Parquet file drops rows that the same filter keeps on the table in memory.
# A column holds 1.0, 1.0 and NaN. NaN is not equal to 1.0, and `Table.filter(field != 1.0)` gives the row with NaN. The
# statistics of the row group say min = max = 1.0, without a word of the NaN, so a scan of the file with the same
# expression leaves out the whole row group. Scores that are not finite then vanish from an audit.
# Seen: "in memory 1, from the file 0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder/scores.parquet" <<'PYTHON'
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet

scores = pa.table({"score": [1.0, 1.0, float("nan")]})
pa.parquet.write_table(scores, sys.argv[1])
differs = pc.field("score") != 1.0
in_memory = scores.filter(differs).num_rows
from_file = pa.dataset.dataset(sys.argv[1]).to_table(filter=differs).num_rows
print(f"in memory {in_memory}, from the file {from_file}")
assert (in_memory, from_file) == (1, 0)
PYTHON
