from django.db import migrations, models

SOURCES = (
    *("clients", "preparers", "affiliates"),
    *("converted_leads", "converted_intakes", "active_leads", "open_intakes"),
    *("lead_profiles", "signups"),
)


class Migration(migrations.Migration):
    dependencies = [("crm", "0020_intake_sources")]

    operations = [
        # What forms allow; nothing is done to the tables.
        migrations.AlterField(model, "source", models.TextField(choices=[(source, source) for source in SOURCES]))
        for model in ("backfillbatch", "contactupdate", "ledgerentry")
    ]
