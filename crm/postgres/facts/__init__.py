"""Facts about a database and the rights of this role. Only reads."""
