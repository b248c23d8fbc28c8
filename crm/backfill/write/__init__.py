"""Writes batches: in one transaction each, or to the overlay of a dry run."""
