"""The admin: contacts, runs and the ledger, to look at. Nobody adds, changes or deletes anything here."""

# Registers them, where Django looks for it.
from crm.admin import model_admins as model_admins
