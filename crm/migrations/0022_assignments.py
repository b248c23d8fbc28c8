from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0021_signup_sources"),
    ]

    operations = [
        # With a default of the database, so that an earlier version can go on writing batches.
        migrations.AddField(
            model_name="backfillbatch", name="assignments", field=models.JSONField(db_default={}, default=dict)
        ),
        migrations.AddField(
            model_name="ledgerentry",
            name="seen_preparer",
            field=models.TextField(
                help_text="The id of the row's preparer when a run last processed the row",
                null=True,
                verbose_name="seen preparer",
            ),
        ),
    ]
