"""What a database has, and what this role may do in it. Only reads."""
