"""What a model learns from the text that is kept for a target."""

from curation.recipes.targeted.byte_convolutions import ByteConvolutions
from curation.recipes.targeted.target_texts import TargetTexts

__all__ = ["ByteConvolutions", "TargetTexts"]
