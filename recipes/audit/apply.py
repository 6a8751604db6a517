"""The way back: what an audit finds, in files that other runs read. Nothing is deleted."""

import json
from pathlib import Path

import numpy as np

from curation.audit import Corrections
from curation.instances.selection_index import SelectionIndex
from curation.recipes.audit.audit import Audit

ACTIONS = ("drop", "weigh", "relabel")


def apply_audit(
    audit: Audit, action: str, path: Path, fingerprint: str, weight: float = 0.0, config: dict | None = None
) -> str:
    """Write what other runs read.

    Args:
        audit: The audit, with suspects.
        action: ``"drop"`` writes a :class:`~curation.instances.selection_index.SelectionIndex` of all other samples;
            ``"weigh"`` and ``"relabel"`` write :class:`~curation.audit.corrections.Corrections`.
        path: The file (Parquet).
        fingerprint: That of the data set on which the others will train; empty if not known.
        weight: Weight of the suspects, with ``"weigh"``.
        config: How the audit was made.

    Returns:
        What was written, in words.

    Raises:
        ValueError: If there are no suspects, all samples are, or there are no classes to relabel with.
        OSError: If the file cannot be written.
    """
    suspects, size = audit.suspects, len(audit.dynamics)
    if not suspects.any():
        raise ValueError("Argument `--apply` needs suspects, but there are none; `--count` says how many.")
    if action == "drop":
        _index(~suspects, np.nan_to_num(-audit.score), fingerprint, config).save(path)
        return f"{size - int(suspects.sum()):,} samples that stay"
    labels, weights = np.full(size, -1), np.ones(size, np.float32)
    if action == "weigh":
        weights[suspects] = weight
    else:
        if audit.dynamics.kind != "classes":
            raise ValueError("Argument `--apply` must be 'drop' or 'weigh' of samples without a class.")
        labels[suspects] = audit.dynamics["suggested"][suspects]
    Corrections(weights, labels, fingerprint).save(path)
    return f"{'weights' if action == 'weigh' else 'labels'} of {int(suspects.sum()):,} samples"


def random_baseline(audit: Audit, path: Path, fingerprint: str, seed: int, config: dict | None = None) -> None:
    """Write the index that leaves out as many random samples as there are suspects.

    Args:
        audit: The audit, with suspects.
        path: The file (Parquet).
        fingerprint: That of the data set.
        seed: Seed of the draw.
        config: How the audit was made.
    """
    size = len(audit.dynamics)
    stays = np.ones(size, bool)
    stays[np.random.default_rng(seed).permutation(size)[: int(audit.suspects.sum())]] = False
    _index(stays, np.zeros(size), fingerprint, config).save(path)


def _index(stays: np.ndarray, scores: np.ndarray, fingerprint: str, config: dict | None) -> SelectionIndex:
    indices = np.flatnonzero(stays)
    if not len(indices):
        raise ValueError("Argument `--apply` must leave samples, but all are suspects.")
    ranks = np.empty(len(indices), np.int64)
    ranks[np.argsort(-scores[indices], kind="stable")] = np.arange(len(indices))
    return SelectionIndex(indices, scores[indices], ranks, len(stays), fingerprint, json.dumps(config or {}))
