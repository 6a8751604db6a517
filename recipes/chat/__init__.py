"""Fine-tuning a language model on chat."""

from curation.recipes.chat.sft import Conversations, SupervisedFineTuning

__all__ = [
    "Conversations",
    "SupervisedFineTuning",
]
