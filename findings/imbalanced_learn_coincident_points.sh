#!/usr/bin/env bash
# imbalanced-learn 0.14.2 (with scikit-learn 1.9.1): of two samples at one point, one is judged by its own label.
# EditedNearestNeighbours drops samples whose nearest neighbours have other labels. It asks for k + 1 neighbours and takes
# the first for the sample itself. Where two samples coincide, the first may be the other one, and the sample stays among
# its own neighbours. Two samples of different classes at one point each have the other as nearest neighbour, so both should
# be dropped; the second one is kept. Moved by 0.001, both are dropped.
# Seen: "at one point: kept [0]" and "apart: kept []" of the two samples.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q imbalanced-learn==0.14.2 scikit-learn==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from imblearn.under_sampling import EditedNearestNeighbours

labels = np.array([0, 1, 0, 0, 1, 1])


def kept_of_the_pair(distance):
    points = np.array([[0.0], [distance], [10.0], [11.0], [20.0], [21.0]])
    rule = EditedNearestNeighbours(n_neighbors=1, kind_sel="all", sampling_strategy="all")
    rule.fit_resample(points, labels)
    return [int(i) for i in rule.sample_indices_ if i < 2]


together, apart = kept_of_the_pair(0.0), kept_of_the_pair(0.001)
print(f"at one point: kept {together}")
print(f"apart: kept {apart}")
assert len(together) == 1
assert apart == []
PYTHON
