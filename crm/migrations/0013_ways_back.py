from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0012_try_execute"),
    ]

    operations = [
        migrations.AddField(
            model_name="backfillrun",
            name="report_lost",
            field=models.BooleanField(
                db_default=False,
                default=False,
                help_text="Its report could not be written, and no later run has reported its new errors",
            ),
        ),
        migrations.AddField(
            model_name="ledgerentry",
            name="former",
            field=models.JSONField(
                help_text="The previous entry, if the row was migrated again because its contact was missing", null=True
            ),
        ),
    ]
