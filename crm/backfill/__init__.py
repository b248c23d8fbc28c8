"""The backfill: reads source rows, maps them to drafts, matches them with contacts, and writes the outcomes."""
