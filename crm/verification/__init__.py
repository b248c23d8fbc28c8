"""Verifies that every source row is accounted for and every contact is correct, in a READ ONLY transaction.

    snapshot -> schema -> reconciliation -> comparison -> figures -> VerificationReport

Everything is read from the tables, never from the counters of a run. Findings contain row references, contact ids and
names of columns, but no values.
"""

from crm.verification.runner import VerificationReport, verify

__all__ = ["VerificationReport", "verify"]
