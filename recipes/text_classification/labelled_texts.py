"""Where labelled texts are read: reasoning-gym's questions, Python's library, a folder, a file, or the hub."""

import os
from typing import Any

from curation.recipes.library_texts import paragraphs
from curation.recipes.sources import Source, installed, require_extra, resolve

TEXTS = (
    Source("reasoning_gym", "questions of 40 task families of the package reasoning-gym", installed("reasoning_gym")),
    Source("library", "paragraphs of 40 modules of Python's standard library"),
)
HELD_OUT = ("validation", "test")
_COLUMNS = ("text", "label")
FAMILIES = (  # whose questions do not depend on Python's hash seed
    "aiw", "base_conversion", "basic_arithmetic", "bitwise_arithmetic", "caesar_cipher", "calendar_arithmetic",
    "chain_sum", "complex_arithmetic", "count_bits", "count_primes", "decimal_arithmetic", "decimal_chain_sum",
    "dice", "family_relationships", "fraction_simplification", "gcd", "gsm_symbolic", "knights_knaves",
    "lcm", "leg_counting", "letter_counting", "manipulate_matrix", "maze", "number_filtering", "number_format",
    "number_sequence", "palindrome_generation", "power_function", "prime_factorization", "products",
    "propositional_logic", "rotate_matrix", "sentence_reordering", "simple_equations", "simple_geometry",
    "spell_backward", "syllogism", "time_intervals", "word_ladder", "word_sequence_reversal",
)  # fmt: skip


def load_texts(data: str, samples_per_class: int = 125) -> dict[str, Any]:
    """Labelled texts by split: ``train``, and ``validation`` and ``test`` where there are any.

    Args:
        data: ``"reasoning_gym"``, ``"library"``, a folder, a file or a hub name, as in
            :class:`~curation.recipes.text_classification.TextEmbeddings`.
        samples_per_class: Texts of each class, in ``"reasoning_gym"`` and ``"library"``.

    Returns:
        A ``datasets.Dataset`` for each split, with the columns ``text`` and ``label``.

    Raises:
        ValueError: If there is no training split, a column is missing, or a text is none.
        FileNotFoundError: If ``data`` is a file that is not there.
        ImportError: If a package is missing.
    """
    require_extra()
    import datasets

    if data == "reasoning_gym":
        return {"train": datasets.Dataset.from_list(_questions(samples_per_class))}
    if data == "library":
        texts = paragraphs(len(FAMILIES), samples_per_class)
        rows = [{"text": text, "label": module} for module in texts for text in texts[module]]
        return {"train": datasets.Dataset.from_list(rows)}
    if data.endswith((".json", ".jsonl")):
        if not os.path.isfile(data):
            raise FileNotFoundError(f"Argument `data` must name a file with rows, but there is no {data!r}.")
        parts = dict(datasets.load_dataset("json", data_files=data))
    else:
        parts = dict(datasets.load_dataset(data))
    parts = {name: parts[name] for name in ("train", *HELD_OUT) if name in parts}
    if "train" not in parts:
        raise ValueError(f"Argument `data` must have the split 'train', but {data!r} has not.")
    for name, rows in parts.items():
        _check_texts(data, name, rows)
    return parts


def _check_texts(data: str, name: str, rows: Any) -> None:
    """Refuse a split that lacks a column, or a text."""
    missing = ", ".join(column for column in _COLUMNS if column not in rows.column_names)
    if missing:
        raise ValueError(f"Argument `data` must have the column {missing}, but `{name}` of {data!r} has not.")
    wrong = next((i for i, text in enumerate(rows["text"]) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"Argument `data` must hold texts, but row {wrong} of `{name}` of {data!r} has none.")


def _questions(samples_per_class: int) -> list[dict[str, str]]:
    """Different questions of each task family, ``samples_per_class`` each."""
    resolve("package:reasoning_gym")
    from reasoning_gym.factory import create_dataset

    rows = []
    for family in FAMILIES:
        questions: dict[str, None] = {}
        for sample in create_dataset(family, size=10 * samples_per_class, seed=0):
            questions[sample["question"]] = None
            if len(questions) == samples_per_class:
                break
        rows += [{"text": question, "label": family} for question in questions]
    return rows
