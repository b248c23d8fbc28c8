from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0014_updated_and_kept"),
    ]

    operations = [
        # NULL for the runs that are there: their record does not tell by which rules they went.
        migrations.AddField(
            "backfillrun",
            "rules",
            models.IntegerField(
                null=True,
                help_text="The number of the rules that it applied; unknown for runs of earlier versions",
            ),
        ),
    ]
