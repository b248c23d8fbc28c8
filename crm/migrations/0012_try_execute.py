from django.conf import settings
from django.db import migrations

# See crm/try_execute.py. What is raised anew says nothing of a row, and is logged.
CREATE = f"""
CREATE FUNCTION {settings.BACKFILL_SCHEMA}.try_execute(statement text, VARIADIC parameters text[])
RETURNS TABLE (id text, refusal text[]) LANGUAGE plpgsql AS $function$
DECLARE
  code text;
  refusing_constraint text;
  refused_column text;
  refusing_table text;
  refusing_context text;
BEGIN
  RETURN QUERY EXECUTE
    'WITH done(id) AS (' || statement || ') SELECT done.id::text, NULL::text[] FROM done' USING parameters;
EXCEPTION WHEN OTHERS THEN
  GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, refusing_constraint = CONSTRAINT_NAME,
    refused_column = COLUMN_NAME, refusing_table = TABLE_NAME, refusing_context = PG_EXCEPTION_CONTEXT;
  IF code ~ '^(08|25|40|53|55|57|58|XX)' THEN
    RAISE;
  END IF;
  RETURN QUERY SELECT NULL::text,
                      ARRAY[code, refusing_constraint, refused_column, refusing_table, refusing_context];
END
$function$
"""
DROP = f"DROP FUNCTION {settings.BACKFILL_SCHEMA}.try_execute(text, text[])"


class Migration(migrations.Migration):
    dependencies = [
        ("crm", "0011_identity_keys"),
    ]

    operations = [
        migrations.RunSQL(CREATE, DROP),
    ]
