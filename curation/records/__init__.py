"""Records of every sample: scores, what training shows of it, and the ledger of choices."""

from curation.records.dynamics import SampleDynamics
from curation.records.dynamics_store import DynamicsStore
from curation.records.ledger import Ledger, LedgerWriter
from curation.records.prompt_memory import PromptMemory
from curation.records.score_store import ScoreStore

__all__ = [
    "DynamicsStore",
    "Ledger",
    "LedgerWriter",
    "PromptMemory",
    "SampleDynamics",
    "ScoreStore",
]
