"""Classifying texts by their embeddings."""

from curation.recipes.text_classification.texts import LinearProbe, TextEmbeddings

__all__ = [
    "LinearProbe",
    "TextEmbeddings",
]
