from typing import Any

from django.db import migrations

ACTIONS = ("add", "change", "delete", "view")


def rename_permissions(old: tuple[str, str], new: tuple[str, str]) -> migrations.RunPython:
    """Give the permissions on a model, by its name and its words, the names of another one.

    Django renames the content type along with the model, and would make new permissions for it: whoever had the old
    ones would have none.
    """

    def rename(apps: Any, schema_editor: Any, before: tuple[str, str], after: tuple[str, str]) -> None:
        permissions = apps.get_model("auth", "Permission").objects.using(schema_editor.connection.alias)
        for action in ACTIONS:
            permissions.filter(content_type__app_label="crm", codename=f"{action}_{before[0]}").update(
                codename=f"{action}_{after[0]}", name=f"Can {action} {after[1]}"
            )

    return migrations.RunPython(
        lambda apps, schema_editor: rename(apps, schema_editor, old, new),
        lambda apps, schema_editor: rename(apps, schema_editor, new, old),
    )


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0017_committed_transaction"),
        ("auth", "0012_alter_user_first_name_max_length"),
    ]

    operations = [
        # The table has a name of its own, and keeps it: nothing is done to it.
        migrations.RenameModel("ConflictDecision", "ConflictResolution"),
        migrations.AlterModelOptions(
            "conflictresolution",
            options={"verbose_name": "resolution of a conflict", "verbose_name_plural": "resolutions of conflicts"},
        ),
        rename_permissions(
            ("conflictdecision", "decision on a conflict"), ("conflictresolution", "resolution of a conflict")
        ),
    ]
