from django.db import migrations, models

import crm.fields

SOURCES = (
    *("clients", "preparers", "affiliates"),
    *("converted_leads", "converted_intakes", "active_leads", "open_intakes"),
)


class Migration(migrations.Migration):
    dependencies = [("crm", "0019_attribution_before")]

    operations = [
        migrations.CreateModel(
            name="TaxIntakeLead",
            fields=[
                ("id", models.TextField(primary_key=True, serialize=False)),
                ("first_name", models.TextField()),
                ("last_name", models.TextField()),
                ("email", models.TextField()),
                ("phone", models.TextField()),
                ("created_at", crm.fields.TimestampField()),
                ("updated_at", crm.fields.TimestampField()),
            ],
            options={"db_table": "tax_intake_leads", "managed": False},
        ),
        # What forms allow; nothing is done to the tables.
        *(
            migrations.AlterField(model, "source", models.TextField(choices=[(source, source) for source in SOURCES]))
            for model in ("backfillbatch", "contactupdate", "ledgerentry")
        ),
    ]
