"""Output: files, CSV, tables, and a standard output that may be full or closed."""
