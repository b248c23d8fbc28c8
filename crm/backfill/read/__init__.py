"""Reads pages of source rows, the existing contacts that they can match, resolutions of conflicts, and row counts."""
