"""The settings, and how the database is reached."""
