"""Rows in error: their export, and resolutions of conflicts."""
