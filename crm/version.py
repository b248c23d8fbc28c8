"""The version of the project and of its rules, stored with every run."""

import django

VERSION = "0.1.0"
#: The output of `--version`.
FULL_VERSION = f"crm-contacts-backfill {VERSION}, Django {django.get_version()}"

#: Increased by every change after which a row may become another contact than before, and by no other change. It is set
#: manually: with a digest of the source code, every new name or comment would count as another version, and the
#: verification would no longer report any defect in earlier contacts. `tests/integration/test_rules.py` asks for it
#: whenever the reference changes.
RULES = 3
