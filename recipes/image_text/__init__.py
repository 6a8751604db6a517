"""Contrastive training on tagged pictures."""

from curation.recipes.image_text.image_text_model import ImageTextModel
from curation.recipes.image_text.tagged_pictures import Pictures, TaggedPictures

__all__ = [
    "ImageTextModel",
    "Pictures",
    "TaggedPictures",
]
