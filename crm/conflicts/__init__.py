"""Rows in error: the list of them, and what people say about those in conflict."""
