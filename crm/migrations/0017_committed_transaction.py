import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0016_large_confidences"),
    ]

    operations = [
        migrations.CreateModel(
            name="CommittedTransaction",
            fields=[
                ("token", models.UUIDField(primary_key=True, serialize=False)),
                ("committed_at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
            ],
            options={
                "db_table": "committed_transaction",
            },
        ),
    ]
