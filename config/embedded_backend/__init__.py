"""A Django database backend: PostgreSQL as Django has it, whose server is started by the first connection."""
