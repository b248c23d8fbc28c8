"""The attribution columns of `crm_contacts`, where Prisma was not first. `crm.attribution` says how, and how not.

Reversing drops what this added, with the data in it, and nothing else.
"""

from django.apps.registry import Apps
from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

from crm import attribution


def add(_apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    attribution.add(schema_editor.connection)


def remove(_apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    attribution.remove(schema_editor.connection)


class Migration(migrations.Migration):
    # An index cannot be built concurrently in a transaction.
    atomic = False
    dependencies = (("crm", "0001_ledger"),)
    operations = (migrations.RunPython(add, remove),)
