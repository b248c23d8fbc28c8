"""Rows in error: the list of them, and what people decide about those in conflict."""
