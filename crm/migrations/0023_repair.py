from django.db import migrations, models

SOURCES = (
    *("clients", "preparers", "affiliates"),
    *("converted_leads", "converted_intakes", "active_leads", "open_intakes"),
    *("lead_profiles", "signups"),
)
REPAIRS = ("preparer_ids", "types", "placeholders")


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0022_assignments"),
    ]

    operations = [
        migrations.AlterField(
            model_name="backfillrun",
            name="kind",
            field=models.TextField(
                choices=[("backfill", "Backfill"), ("rollback", "Rollback"), ("repair", "Repair")],
                default="backfill",
            ),
        ),
        migrations.AlterField(
            model_name="backfillbatch",
            name="source",
            field=models.TextField(choices=[(name, name) for name in (*SOURCES, *REPAIRS)]),
        ),
    ]
