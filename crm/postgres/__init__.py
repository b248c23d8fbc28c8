"""How we talk to PostgreSQL: connections, errors, transactions, snapshots, arrays."""
