"""Classifying texts by their embeddings."""

from curation.recipes.text_classification.linear_probe import LinearProbe
from curation.recipes.text_classification.text_embeddings import TextEmbeddings

__all__ = [
    "LinearProbe",
    "TextEmbeddings",
]
