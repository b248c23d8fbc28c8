"""Migrates the people of a web application into its CRM."""
