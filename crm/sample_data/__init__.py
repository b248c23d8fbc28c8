"""People as they really are in the application's tables, made up and repeatable.

    words       what people are called and what they type: names, phones, referrers, messages
    shapes      what differs between the generations of the tables
    chance      everything random: picks, ids, dates
    population  PURE: a number of people -> rows of every table, a chunk at a time
    crm         PURE: the contacts that the CRM already has, and what happened to them
    loader      the only part that touches a database

The pure parts import the standard library only.
"""
