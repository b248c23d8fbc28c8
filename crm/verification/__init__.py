"""The proof that everybody is there, and there as they should be. Only reads, and says so to PostgreSQL.

    snapshot -> schema -> reconciliation -> comparison -> figures -> VerificationReport

Everything is asked of the tables themselves, never of the counters of a run. What is found is told by row reference,
contact id and names of columns: never by what stands in them.
"""

from crm.verification.runner import VerificationReport, verify

__all__ = ["VerificationReport", "verify"]
