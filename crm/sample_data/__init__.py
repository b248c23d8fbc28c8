"""Realistic and reproducible sample people for the application's tables.

    words       names, phone numbers, referrers and messages
    shapes      differences between the generations of the tables
    chance      random picks, ids and dates
    population  PURE: a number of people -> rows of every table, a chunk at a time
    crm         PURE: contacts that the CRM already has, with their history
    loader      the only part that uses a database

The pure parts import the standard library only.
"""
