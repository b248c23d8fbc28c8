"""Writing: a batch in one transaction, or in a dry run's memory."""
