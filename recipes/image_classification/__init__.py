"""Classifying images: Fashion-MNIST and handwritten digits."""

from curation.recipes.image_classification.images import CorruptedShare, ImageClassifier, Images

__all__ = [
    "CorruptedShare",
    "ImageClassifier",
    "Images",
]
