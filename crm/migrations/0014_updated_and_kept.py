from django.db import migrations, models

AS_WELL = "Of the rows that changed their contact; earlier versions counted them as kept"


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0013_ways_back"),
    ]

    operations = [
        # Runs and batches that are there have NULL: what they counted as kept may have changed something or not.
        migrations.AddField("backfillrun", "updated_and_kept", models.BigIntegerField(null=True)),
        migrations.AddField("backfillbatch", "updated_and_kept", models.IntegerField(null=True)),
        migrations.AlterField(
            "backfillrun",
            "updated_and_kept",
            models.BigIntegerField("kept a value as well", null=True, default=0, help_text=AS_WELL),
        ),
        migrations.AlterField(
            "backfillbatch",
            "updated_and_kept",
            models.IntegerField("kept a value as well", null=True, default=0),
        ),
        migrations.AlterField(
            "backfillrun",
            "updated",
            models.BigIntegerField("changed", default=0, help_text="Rows that changed their contact"),
        ),
        migrations.AlterField("backfillbatch", "updated", models.IntegerField("changed", default=0)),
        migrations.AlterField(
            "backfillrun",
            "kept",
            models.BigIntegerField(
                "kept only",
                default=0,
                help_text=("Rows that changed nothing, because a person may have written the contact's value"),
            ),
        ),
        migrations.AlterField("backfillbatch", "kept", models.IntegerField("kept only", default=0)),
    ]
