"""The admin: contacts, runs and the ledger, read-only."""

# Registers the model admins: Django's autodiscovery imports this package.
from crm.admin import model_admins as model_admins
