"""Where output goes: files, CSV, and a standard output that may be full or closed."""
