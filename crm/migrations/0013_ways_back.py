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
                help_text="Its report could not be written, and no later run has told of it",
            ),
        ),
        migrations.AddField(
            model_name="ledgerentry",
            name="former",
            field=models.JSONField(
                help_text="The line before the row was made a contact again, since its contact was gone", null=True
            ),
        ),
    ]
