from django.db import migrations, models

HELP = "The values that the attribution replaced"
NULLS = ", ".join(
    f"'{name}', NULL"
    for name in (
        *("referrer_username", "referrer_type", "commission_rate", "commission_rate_locked_at"),
        "attribution_method",
    )
)
FORWARDS = "jsonb_build_object({nulls}, 'attribution_confidence', {confidence})"

# Until now all of an attribution was NULL where one was filled, but for its confidence.
UNITE = """
ALTER TABLE {table} ALTER COLUMN confidence_before TYPE jsonb
      USING CASE WHEN confidence_before IS NOT NULL THEN {united} END;
ALTER TABLE {table} RENAME COLUMN confidence_before TO attribution_before
"""
SEPARATE = """
ALTER TABLE {table} ALTER COLUMN attribution_before TYPE bigint
      USING (attribution_before ->> 'attribution_confidence')::bigint;
ALTER TABLE {table} RENAME COLUMN attribution_before TO confidence_before
"""
# An entry keeps the one that it took the place of.
UNITE_FORMER = """
UPDATE ledger_entry
   SET former = (former - 'confidence_before') || jsonb_build_object('attribution_before',
         CASE WHEN former ->> 'confidence_before' IS NOT NULL THEN {united} END)
 WHERE former ? 'confidence_before'
"""
SEPARATE_FORMER = """
UPDATE ledger_entry
   SET former = (former - 'attribution_before') || jsonb_build_object('confidence_before',
         former -> 'attribution_before' -> 'attribution_confidence')
 WHERE former ? 'attribution_before'
"""


def united(confidence: str) -> str:
    return FORWARDS.format(nulls=NULLS, confidence=confidence)


def of_table(model: str, table: str) -> migrations.RunSQL:
    return migrations.RunSQL(
        UNITE.format(table=table, united=united("confidence_before")),
        SEPARATE.format(table=table),
        state_operations=[
            migrations.RemoveField(model, "confidence_before"),
            migrations.AddField(model, "attribution_before", models.JSONField(null=True, help_text=HELP)),
        ],
    )


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0018_conflict_resolution"),
    ]

    operations = [
        of_table("ledgerentry", "ledger_entry"),
        of_table("contactupdate", "contact_update"),
        migrations.RunSQL(
            UNITE_FORMER.format(united=united("(former ->> 'confidence_before')::bigint")), SEPARATE_FORMER
        ),
    ]
