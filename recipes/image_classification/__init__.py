"""Classifying images: Fashion-MNIST and handwritten digits."""

from curation.recipes.image_classification.corrupted_share import CorruptedShare
from curation.recipes.image_classification.image_classifier import ImageClassifier
from curation.recipes.image_classification.images import Images

__all__ = [
    "CorruptedShare",
    "ImageClassifier",
    "Images",
]
