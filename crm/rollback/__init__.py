"""Taking a run back, row by row, without touching what people changed since.

Every contact that the run created ends as one of three:

- reversed: deleted, because nobody touched it. Its `updatedAt` is the one that it was made with, its columns are what
  its source rows map to (raw SQL does not bump `updatedAt`), the columns that the backfill does not write have their
  defaults, and no row of any table refers to it.
- kept: somebody changed it, refers to it or deleted it. Its ledger entry stays, so it is neither made again nor, where
  it was deleted, brought back.
- failed: the database refused, with the SQLSTATE.

What the run merged into other contacts is taken out again where it still stands as it was written and nobody touched
the contact since, which the ledger tells by the contact's `updatedAt` at the merge; otherwise it is kept. Entries of
rows that met somebody else's contact, or had an error, are removed, except where that contact was deleted since:
without its entry the row would bring the person back.

Whatever was merged into a contact goes with it, also by a later run: those rows are pending again, too, and the next
backfill brings them all back. So does what other runs merged on top of a value that is taken out: such a row would have
filled it itself, and left it alone because it was there. What was merged by the same run into a contact that stays,
stays.

What the run changed with --update goes first, where it still stands as it was written: what was filled is blank again,
the placeholder is back, type and stage are what they were, and our line of the contact's history is gone. The next run
with --update looks at these rows again. A contact that a later run promoted stays until that run is taken back: its
history refers to it.

The rows whose entries are gone count as pending. A rollback that was killed is gone on with by running it again.
"""
