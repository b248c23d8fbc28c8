"""The second look of a run with --update: at rows that changed since, and at contacts that others made.

    page of rows (the ordinary reader, with another condition) -> map -> lines, contacts and keys as they are now
        -> decide (pure) -> contacts, stage history, record of changes, lines, counts, heartbeat -> commit

1. Runs after the ordinary sources, source by source, in the same run and through the same pipeline: the same fence,
   batches, retries, throttles and stops. One process does it, whatever --workers says: rows of one contact may be of
   different people by now, and what fills first must not depend on who is faster.
2. A row is looked at again when its `updatedAt` is not the one that its line saw last; or when it met somebody else's
   contact and could fill a blank there, is a profile that was merged into a contact that is still a lead, or has an
   email now where its contact has a placeholder. A row whose contact was deleted is not: deleted stays deleted.
3. What it may do: fill what is NULL, replace its placeholder email, promote a contact that is as we wrote it: LEAD to
   the type of a profile or of a converted lead, and the stage forward in the order of the database's enum, with a row
   of `crm_stage_history`. Every other value stays. Where the contact has another value and is not as we wrote it, the
   row is `kept`; so is one whose keys name another contact by now.
4. A blank that a person made is no blank: one that the backfill once filled, when it made the contact, by a merge or by
   an update. The lines say what was filled. Every other blank is filled, also in a contact that somebody touched.
5. `updatedAt` of the contact and `source_updated_at` of the line stay what they are: together they go on telling
   whether somebody touched the contact, and whether its row is what it was. That a row was looked at again is
   `seen_updated_at`.
6. What was changed is a line of `contact_update`, by names and labels: the admin shows it, a rollback takes it back,
   and a verification knows from it which row a value came from.
7. A contact is decided without locks, and written only if it still is the version that was decided on; else it is
   looked at again. What PostgreSQL refuses is kept, and tried again by the next run.
"""
