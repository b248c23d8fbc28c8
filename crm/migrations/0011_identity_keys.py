from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0010_process_identity"),
    ]

    operations = [
        migrations.AddField(
            model_name="ledgerentry",
            name="identity_keys",
            field=models.JSONField(
                help_text="For a conflict: the contact that each key of the row matches, if any", null=True
            ),
        ),
    ]
