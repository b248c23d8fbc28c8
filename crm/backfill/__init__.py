"""The backfill: source rows are read, mapped to drafts, decided on, written and counted."""
