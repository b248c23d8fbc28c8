"""The rules of the migration. Pure: no database, no settings, no clock; values in, values out."""
