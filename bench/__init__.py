"""How fast the backfill is, against what the server itself can do. `make bench`."""
