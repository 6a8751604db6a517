"""Contrastive training on tagged pictures."""

from curation.recipes.image_text.image_text import ImageTextModel, Pictures, TaggedPictures

__all__ = [
    "ImageTextModel",
    "Pictures",
    "TaggedPictures",
]
