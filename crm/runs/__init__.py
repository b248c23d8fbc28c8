"""The parts that backfills and rollbacks share: lease, control, retries, progress."""
