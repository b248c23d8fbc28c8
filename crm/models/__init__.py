"""Models of the application's tables (unmanaged) and of the backfill's own tables."""

from crm.models.conflict_resolution import ConflictResolution
from crm.models.contacts import CRMContact, CRMInteraction, CRMStageHistory
from crm.models.ledger import BackfillBatch, BackfillRun, LedgerEntry
from crm.models.legacy import Lead, Profile, TaxIntakeLead, User
from crm.models.rollback import Rollback
from crm.models.transaction import CommittedTransaction
from crm.models.update import ContactUpdate

__all__ = [
    "BackfillBatch",
    "BackfillRun",
    "CRMContact",
    "CRMInteraction",
    "CRMStageHistory",
    "CommittedTransaction",
    "ConflictResolution",
    "ContactUpdate",
    "Lead",
    "LedgerEntry",
    "Profile",
    "Rollback",
    "TaxIntakeLead",
    "User",
]
