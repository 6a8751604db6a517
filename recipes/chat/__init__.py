"""Fine-tuning a language model on chat."""

from curation.recipes.chat.conversations import Conversations
from curation.recipes.chat.supervised_fine_tuning import SupervisedFineTuning

__all__ = [
    "Conversations",
    "SupervisedFineTuning",
]
