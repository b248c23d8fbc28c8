"""Access to PostgreSQL: connections, errors, transactions, snapshots, arrays."""
