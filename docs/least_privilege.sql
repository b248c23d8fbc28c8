-- A role for the backfill that may do what the backfill does, and nothing else.
--
--   psql --set role=crm_backfill_job --set schema=public --file docs/least_privilege.sql "$OWNER_URL"
--
--   role      the name of the role; made where it is missing, without a password        default: crm_backfill_job
--   schema    the schema of the application's tables                                    default: public
--   update    on: the role may also look at rows again (backfill_crm_contacts --update)  default: off
--   rollback  on: the role may also take a run back (rollback_crm_backfill)             default: off
--
-- It works on the database that psql is connected to, as a superuser, or as the owner of the application's tables and
-- of the schema crm_backfill who has CREATEROLE. Run it after every `python manage.py migrate`, and again at any time:
-- what the role may do on these tables is taken away and granted anew, in one transaction. Then give it a password
-- (\password crm_backfill_job), put it into DATABASE_URL, and let
--
--   python manage.py check --database default
--
-- tell what is missing or too much.
--
-- `migrate` is not for this role. It makes the schema crm_backfill and the tables in it, which takes CREATE on the
-- database (or a schema of that name that it owns), and it adds the attribution columns to crm_contacts where Prisma has
-- not, which only the owner of that table can. Run it under the role that the application's own migrations run under.
-- The admin is not for this role either: it keeps accounts and sessions in crm_backfill and shows interactions.

\set ON_ERROR_STOP on
\set QUIET on
\if :{?role}
\else
  \set role crm_backfill_job
\endif
\if :{?schema}
\else
  \set schema public
\endif
\if :{?update}
\else
  \set update off
\endif
\if :{?rollback}
\else
  \set rollback off
\endif

BEGIN;

DO $$
BEGIN
  IF to_regclass('crm_backfill.ledger_entry') IS NULL THEN
    RAISE EXCEPTION 'There is no ledger in this database: run `python manage.py migrate` first.';
  END IF;
END
$$;

SELECT format('CREATE ROLE %I LOGIN', :'role')
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'role')
\gexec

-- A connection through PgBouncer cannot choose its search path, so the role brings it along.
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'role'),
       format('ALTER ROLE %I IN DATABASE %I SET search_path = crm_backfill, %I',
              :'role', current_database(), :'schema')
\gexec

REVOKE ALL ON ALL TABLES IN SCHEMA :"schema", crm_backfill FROM :"role";
REVOKE ALL ON SCHEMA :"schema", crm_backfill FROM :"role";
GRANT USAGE ON SCHEMA :"schema", crm_backfill TO :"role";

-- The application's tables, column by column: what is not named here can be neither read nor written. Columns that a
-- generation of the application does not have are passed over.
WITH wanted (table_name, privilege, columns) AS (
  VALUES
    ('users', 'SELECT', ARRAY['id', 'email', 'updatedAt']),
    ('profiles', 'SELECT', ARRAY[
      'id', 'userId', 'clerkUserId', 'role', 'firstName', 'lastName', 'phone', 'companyName', 'createdAt', 'updatedAt'
    ]),
    ('leads', 'SELECT', ARRAY[
      'id', 'type', 'status', 'firstName', 'lastName', 'email', 'phone', 'source', 'assignedPreparerId',
      'lastContactedAt', 'createdAt', 'updatedAt', 'referrerUsername', 'referrerType', 'commissionRate',
      'commissionRateLockedAt', 'attributionMethod', 'attributionConfidence'
    ]),
    -- xmin is PostgreSQL's own: it tells a rollback whether a contact is still as it was when it was judged.
    ('crm_contacts', 'SELECT', ARRAY[
      'xmin', 'id', 'userId', 'clerkUserId', 'contactType', 'firstName', 'lastName', 'email', 'phone', 'company',
      'stage', 'stageEnteredAt', 'source', 'assignedPreparerId', 'assignedAt', 'referrerUsername', 'referrerType',
      'commissionRate', 'commissionRateLockedAt', 'attributionMethod', 'attributionConfidence', 'createdAt',
      'updatedAt', 'lastContactedAt'
    ]),
    ('crm_contacts', 'INSERT', ARRAY[
      'id', 'userId', 'clerkUserId', 'contactType', 'firstName', 'lastName', 'email', 'phone', 'company', 'stage',
      'stageEnteredAt', 'source', 'assignedPreparerId', 'assignedAt', 'referrerUsername', 'referrerType',
      'commissionRate', 'commissionRateLockedAt', 'attributionMethod', 'attributionConfidence', 'createdAt',
      'updatedAt', 'lastContactedAt'
    ]),
    -- What a merge may fill.
    ('crm_contacts', 'UPDATE', ARRAY[
      'userId', 'clerkUserId', 'phone', 'company', 'assignedPreparerId', 'assignedAt', 'referrerUsername',
      'referrerType', 'commissionRate', 'commissionRateLockedAt', 'attributionMethod', 'attributionConfidence',
      'lastContactedAt'
    ])
)
SELECT format('GRANT %s (%s) ON %I.%I TO %I', privilege, string_agg(quote_ident(attname), ', ' ORDER BY attnum),
              :'schema', table_name, :'role')
  FROM wanted
  JOIN pg_attribute ON attrelid = format('%I.%I', :'schema', table_name)::regclass
                   AND attname = ANY (columns) AND NOT attisdropped
 GROUP BY table_name, privilege
\gexec

-- Our own tables.
GRANT SELECT, INSERT, UPDATE ON crm_backfill.backfill_run, crm_backfill.ledger_entry TO :"role";
GRANT SELECT, INSERT ON crm_backfill.backfill_batch, crm_backfill.contact_update TO :"role";
-- A run reads what was decided about rows in conflict; resolve_crm_conflict records it under this role too.
GRANT SELECT, INSERT, UPDATE ON crm_backfill.conflict_decision TO :"role";

\if :update
  -- OPTIONAL: looking at rows again. A contact that nobody touched becomes what its rows say: its name, type and origin
  -- are written anew, a placeholder email is replaced, and its stage moves forward, with a line in its history.
  GRANT UPDATE ("firstName", "lastName", "email", "contactType", "source", "stage", "stageEnteredAt")
     ON :"schema".crm_contacts TO :"role";
  GRANT INSERT ("id", "contactId", "fromStage", "toStage", "reason", "createdAt") ON :"schema".crm_stage_history
     TO :"role";
\endif

\if :rollback
  -- OPTIONAL: taking a run back. A contact goes only where nobody has changed or filled in anything since, in whatever
  -- column, and where no row of any table refers to it; so all of that must be seen.
  GRANT SELECT, DELETE ON :"schema".crm_contacts TO :"role";
  GRANT DELETE ON crm_backfill.ledger_entry, crm_backfill.contact_update TO :"role";
  \if :update
    -- With a promotion goes the line of the history that told of it.
    GRANT SELECT ("id"), DELETE ON :"schema".crm_stage_history TO :"role";
  \endif
  SELECT format('GRANT SELECT, INSERT, UPDATE ON %s TO %I', found, :'role')
    FROM to_regclass('crm_backfill.rollback') AS found
   WHERE found IS NOT NULL
  \gexec
  SELECT format('GRANT USAGE ON SCHEMA %I TO %I', nspname, :'role'),
         format('GRANT SELECT (%s) ON %s TO %I', string_agg(quote_ident(attname), ', '), conrelid::regclass, :'role')
    FROM pg_constraint
    JOIN pg_class ON pg_class.oid = conrelid
    JOIN pg_namespace ON pg_namespace.oid = relnamespace
    JOIN pg_attribute ON attrelid = conrelid AND attnum = ANY (conkey)
   WHERE contype = 'f' AND confrelid = format('%I.crm_contacts', :'schema')::regclass
   GROUP BY conrelid, nspname
  \gexec
  -- The application's own tables that refer to contacts, where Prisma keeps the relations and there are no foreign keys.
  SELECT format('GRANT SELECT ("contactId") ON %s TO %I', attrelid::regclass, :'role')
    FROM pg_attribute
   WHERE attrelid IN (to_regclass(format('%I.crm_interactions', :'schema')),
                      to_regclass(format('%I.crm_stage_history', :'schema')))
     AND attname = 'contactId' AND NOT attisdropped
  \gexec
\endif

COMMIT;
