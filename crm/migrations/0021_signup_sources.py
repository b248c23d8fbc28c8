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
        *(
            migrations.AlterField(model, "source", models.TextField(choices=[(source, source) for source in SOURCES]))
            for model in ("backfillbatch", "contactupdate", "ledgerentry")
        ),
        migrations.RemoveConstraint("conflictresolution", "a_decision_names_a_row"),
        migrations.AddConstraint(
            "conflictresolution",
            models.CheckConstraint(
                condition=models.Q(
                    ("row__startswith", "profiles:"),
                    ("row__startswith", "leads:"),
                    ("row__startswith", "tax_intake_leads:"),
                    ("row__startswith", "users:"),
                    _connector="OR",
                ),
                name="a_decision_names_a_row",
            ),
        ),
    ]
