"""The version of the project and of its rules, stored with every run."""

import django

VERSION = "0.1.0"
#: What `--version` says.
FULL_VERSION = f"crm-contacts-backfill {VERSION}, Django {django.get_version()}"

#: Raised by every change after which a row may become another contact than before, and by no other change. By hand: a
#: digest of the sources would take every new name and every comment for other rules, and a verification would then find
#: no defect any more in what earlier versions wrote. `tests/unit/test_rules.py` asks whoever changes a rule.
RULES = 2
