"""Rolls back a run, row by row, and keeps everything that people changed since.

Each contact that the run created gets one of three statuses:

- reversed: the contact was unmodified and has been deleted. Unmodified means: its `updatedAt` is the one that it was
  created with, its columns are what its source rows map to (raw SQL does not set `updatedAt`), the columns that the
  backfill does not write have their defaults, and no row of any table refers to it.
- kept: the contact was modified, is referred to, or was deleted. Its ledger entry stays, so no run creates the contact
  again.
- failed: the database refused the deletion. The SQLSTATE is recorded.

What the run merged into other contacts is removed if it is unchanged and the contact is unmodified since, according to
the contact's `updatedAt` at the merge, which the ledger records. Otherwise it is kept. Entries of rows that matched a
contact created elsewhere, or had an error, are deleted, unless that contact was deleted since: without its entry, the
row would create the person again.

Everything merged into a deleted contact is reversed too, whichever run merged it: those rows are pending again, and the
next backfill migrates them all. The same applies to what other runs merged on top of a removed value: such a row would
have filled the value itself if it had been empty. What the same run merged into one of its contacts is kept if the
contact is kept.

Changes by --update are reversed first, if they are still in place: filled fields are blank again, the placeholder,
type and stage are restored, and the history row of the backfill is deleted. The next run with --update revisits these
rows. A contact that a later run promoted is kept until that run is rolled back, because its history refers to it.

Rows whose entries are deleted count as pending. To continue an interrupted rollback, run it again.
"""
