"""The second look of a run with --update: contacts become what their rows say now.

    page of rows that are due -> map -> entries, contacts, all of their rows and keys as they are now
        -> decide (pure) -> contacts, stage history, record of changes, entries, counts, heartbeat -> commit

1. Runs after the ordinary sources, source by source, in the same run and through the same pipeline: the same lease,
   batches, retries, throttles and stops. One process does it, whatever --workers says: rows of one contact may be of
   different people by now, and what fills first must not depend on who is faster.
2. A row is due when its `updatedAt` is not the one that its entry saw last, when it came to a contact and no update has
   looked at it yet, or when it is a profile that has an email now and its contact a placeholder. A row whose contact
   was deleted is not: deleted stays deleted.
3. A contact that is as we wrote it is to be what `crm.rules.fold` makes of all its rows in canonical order, as they
   map now. So any order of runs ends where one full run ends. Three things are held to besides: the stage never moves
   back, nor does the type with it; what no row has any more is not taken away; and where a row of the contact is gone,
   maps to nothing, or names another contact by now, what is there comes before all rows. A confidence without an
   attribution says nothing: it stays that of the row that made the contact.
4. A contact that somebody touched, or made, is filled where it is blank. Every other value stays, and a row that would
   have changed one and nothing else is `kept`; so is one whose keys name another contact by now. What updates
   themselves filled in somebody else's contact is ours to replace for as long as nobody touched it since.
5. A blank that a person made is no blank: one that the backfill once filled, when it made the contact, by a merge or by
   an update. The entries say what was filled.
6. A row writes what comes from itself, and what comes from rows that are not due: they will not be asked.
7. `updatedAt` of the contact and `source_updated_at` of the entry stay what they are: together they go on telling
   whether somebody touched the contact, and whether its row is what it was. That a row was looked at is
   `seen_updated_at`.
8. What was changed is a line of `contact_update` for each row that something came from, by names and labels: the admin
   shows it, a rollback takes it back, and a verification knows from it which row a value came from. What was replaced
   is found again in the row that has it; ids and moments are recorded as they were.
9. A contact is decided without locks, and written only if it still is the version that was decided on; else it is
   looked at again. What PostgreSQL refuses is kept, and tried again by the next run.
"""
