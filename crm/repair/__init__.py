"""Repairs contacts that were created elsewhere. The rules are in `crm.repair.rules`.

    page of contacts by id -> read contacts, profiles, owners of addresses -> decide (pure)
        -> write the repaired columns, record, counts, heartbeat -> commit

A repair is a run of its own: it takes the lease, can be paused and cancelled, and records each change in
`contact_update`, like an update does, so that a rollback can restore the former value. It changes neither the contacts
of the backfill nor `updatedAt`. A contact is read without a lock, and written only if its row version is unchanged;
otherwise it is read again. To continue a repair that was stopped, run it again: what is repaired stays so.
"""
