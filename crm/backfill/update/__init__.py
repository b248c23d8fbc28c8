"""The second pass of a run with --update: brings contacts up to date with their source rows.

    page of due rows -> map -> entries, contacts, and all their current rows and keys
        -> decide (pure) -> contacts, stage history, record of changes, entries, counts, heartbeat -> commit

1. The pass follows the ordinary sources, source by source, in the same run and through the same pipeline: with the same
   lease, batches, retries, throttles and stops. It uses one process, whatever the value of --workers: rows of one
   contact can belong to different people now, and which row fills first must not depend on the speed of a process.
2. A row is due if its `updatedAt` differs from the one that its entry recorded last, if it matched a contact and no
   update has revisited it yet, if it is a profile with an email whose contact has a placeholder, or if it has another
   preparer than its entry recorded, which other tables determine. A row whose contact was deleted is not due, because
   deleted contacts stay deleted.
3. An unmodified contact of the backfill becomes what `crm.rules.fold` makes of all its rows in canonical order, as they
   map now. So any order of runs has the same result as one full run. There are three exceptions. The stage never moves
   back, nor does the type that a lead or an intake gives. A value that no row has any more is not removed. If a row of
   the contact is missing, maps to no contact, or has the keys of another contact now, the existing values take
   precedence over all rows, except over the type that a profile gives by its role: one that has become LEAD gives it
   only if no other row comes first. A confidence without an attribution has no meaning: it stays that of the row that
   created the contact.
4. A contact that was modified, or created elsewhere, is only filled where it is blank. Every other value is kept. A row
   that would only have changed such values is `kept`, and so is a row with the keys of another contact. A value that an
   update filled in a contact created elsewhere can be replaced as long as the contact is unmodified since.
5. A field that a person emptied is not blank. These are fields that the backfill filled before: when it created the
   contact, by a merge, or by an update. The entries record what was filled. Until a contact is modified, only its
   assignment counts as emptied: no run empties one.
6. A row writes its own values, and those of rows that are not due, because these are not revisited.
7. `updatedAt` of the contact and `source_updated_at` of the entry are not changed, because they show whether the
   contact was modified, and whether the row is unchanged. `seen_updated_at` and `seen_preparer` record that a row was
   revisited, and which preparer it had.
8. The changes are recorded in `contact_update`, one row for each source row, by names and labels: the admin shows
   them, a rollback reverses them, and the verification uses them to find the source row of a value. A replaced value is
   recorded by reference to the row that has it; replaced ids and times are recorded as values. An assignment is also
   recorded as it was written, because its row does not show that it has another preparer later.
9. A contact is assessed without locks, and written only if its row version is unchanged; otherwise it is revisited. A
   change that PostgreSQL refuses is counted as kept, and the next run tries it again.
"""
