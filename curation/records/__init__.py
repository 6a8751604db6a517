"""Records of every sample: scores, and the ledger of choices."""

from curation.records.ledger import Ledger, LedgerWriter
from curation.records.score_store import ScoreStore

__all__ = [
    "Ledger",
    "LedgerWriter",
    "ScoreStore",
]
