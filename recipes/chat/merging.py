"""Rows of one conversation as one row: no context is computed twice."""

from collections.abc import Mapping, Sequence
from typing import Any

from curation.scoring import IGNORED


def merge_turns(rows: Sequence[Mapping[str, Sequence[int]]]) -> list[dict[str, Any]]:
    """Merge rows of tokens where one begins with another, with the labels of both.

    For a causal language model every label keeps its context, and so its loss. A row that no longer one begins with,
    as where a chat template strips what was thought in earlier turns, stays as it is.

    Args:
        rows: ``input_ids`` and ``labels`` of the replies of a conversation, in any order; labels are -100 where
            nothing is predicted.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` of the merged rows, the longest first, and ``merged``, the
        number of rows in each.

    Raises:
        ValueError: If two rows label the same token differently.

    Example:
        >>> one = {"input_ids": [5, 6], "labels": [-100, 6]}
        >>> two = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]}
        >>> (row,) = merge_turns([one, two])
        >>> row["labels"], row["merged"]
        ([-100, 6, -100, 8], 2)
    """
    merged: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        tokens, labels = list(row["input_ids"]), row["labels"]
        whole = next((other for other in merged if other["input_ids"][: len(tokens)] == tokens), None)
        if whole is None:
            merged.append(
                {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": list(labels), "merged": 1}
            )
            continue
        for place, label in enumerate(labels):
            if label == IGNORED:
                continue
            if whole["labels"][place] not in (IGNORED, label):
                raise ValueError(f"Argument `rows` must agree on their labels, but token {place} has two.")
            whole["labels"][place] = label
        whole["merged"] += 1
    return merged
