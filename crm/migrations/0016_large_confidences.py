from django.db import migrations, models

HELP = "The attribution confidence before the attribution was filled"


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0015_rules"),
    ]

    operations = [
        # The application's column may be a bigint.
        migrations.AlterField("contactupdate", "confidence_before", models.BigIntegerField(null=True, help_text=HELP)),
        migrations.AlterField("ledgerentry", "confidence_before", models.BigIntegerField(null=True, help_text=HELP)),
    ]
