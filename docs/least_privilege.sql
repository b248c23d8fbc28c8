-- Create a role with the rights that the backfill needs, and no others.
--
--   psql --set role=crm_backfill_job --set schema=public --file docs/least_privilege.sql "$OWNER_URL"
--
--   role      the name of the role; created without a password if it is missing           default: crm_backfill_job
--   schema    the schema of the application's tables                                      default: public
--   update    on: the role can also update contacts (backfill_crm_contacts --update)      default: off
--   rollback  on: the role can also roll back a run (rollback_crm_backfill)               default: off
--
-- psql ignores misspelled variables: check the last line of the output, which says which of the two options are on.
--
-- Run the script in the application's database, as a superuser or as the owner of the application's tables and of the
-- schema crm_backfill. Creating the role also takes CREATEROLE; without it, the script prints the two statements that
-- an administrator must run first, and changes nothing. Run it after every `python manage.py migrate`, and at any other
-- time: in one transaction, it revokes everything that was granted to the role in this database, in every schema (also
-- by default privileges), and grants what the role needs. It does not change what the role owns, the roles of which it
-- is a member, and rights of the whole server: on parameters (PostgreSQL 15 and later), on tablespaces and on other
-- databases. If another role than the owner granted a right, the script names that role and the statements with which
-- a superuser revokes the right, and changes nothing. It refuses a superuser, the current role, and the owner of the
-- database, of a schema or of a table, because such a role has other tasks. It also refuses a table of an untrusted
-- role (docs/runbook.md) that refers to contacts. Then set a password (\password crm_backfill_job), set the role in
-- DATABASE_URL, and list missing and excess rights with
--
--   python manage.py check --database default
--
-- `migrate` is not for this role. It creates the schema crm_backfill and its tables, which takes CREATE on the database
-- (or ownership of such a schema), and adds the attribution columns to crm_contacts if Prisma has not, which takes
-- ownership of that table. Use the role that runs the application's own migrations. The admin is not for this role
-- either: it keeps accounts and sessions in crm_backfill and shows interactions.

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

-- With another search path, this script could call functions that other roles created in its schemas.
SET LOCAL search_path = pg_catalog, pg_temp;

-- A PL/pgSQL block cannot read psql variables.
SET LOCAL least_privilege.role = :'role';
SET LOCAL least_privilege.schema = :'schema';
SET LOCAL least_privilege.update = :'update';
SET LOCAL least_privilege.rollback = :'rollback';

-- First check for everything that would stop the script half-way.
DO $$
DECLARE
  job text := current_setting('least_privilege.role');
  app text := current_setting('least_privilege.schema');
  contacts oid := to_regclass(format('%I.crm_contacts', app));
  job_oid oid := (SELECT oid FROM pg_roles WHERE rolname = job);
  option text;
  making text := format('ALTER ROLE %I IN DATABASE %I SET search_path = crm_backfill, %I;',
                        job, current_database(), app);
  others text;
  whose record;
BEGIN
  FOREACH option IN ARRAY ARRAY['update', 'rollback'] LOOP
    IF current_setting('least_privilege.' || option) NOT IN ('on', 'off') THEN
      RAISE EXCEPTION '% is neither on nor off: write --set %=on, or leave it out. Nothing was changed.',
        option, option;
    END IF;
  END LOOP;

  IF to_regclass('crm_backfill.ledger_entry') IS NULL THEN
    RAISE EXCEPTION 'There is no ledger in this database: run `python manage.py migrate` first.';
  END IF;

  IF contacts IS NULL THEN
    RAISE EXCEPTION 'There is no table crm_contacts in the schema %: name another one with --set schema=...', app;
  END IF;

  -- An owner or administrator would miss the rights that are revoked below.
  SELECT string_agg(what, ', ') INTO others FROM (
    SELECT 'a superuser' FROM pg_roles WHERE oid = job_oid AND rolsuper
     UNION ALL
    SELECT 'the role that runs this' WHERE job IN (current_user, session_user)
     UNION ALL
    SELECT 'the owner of the database' FROM pg_database WHERE datname = current_database() AND datdba = job_oid
     UNION ALL
    (SELECT format('the owner of the schema %I', nspname) FROM pg_namespace
      WHERE nspname IN (app, 'crm_backfill') AND nspowner = job_oid ORDER BY 1)
     UNION ALL
    (SELECT format('the owner of %I.%I', nspname, relname) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
      WHERE nspname IN (app, 'crm_backfill') AND relkind IN ('r', 'p', 'v', 'm', 'f') AND relowner = job_oid
      ORDER BY 1 LIMIT 3)) AS found(what);
  IF others IS NOT NULL THEN
    RAISE EXCEPTION 'The role % is %: this script is for a role that owns nothing and administers nothing. Name '
      'another one, or one that is to be made, with --set role=... Nothing was changed.', job, others;
  END IF;

  -- As in crm/postgres/trust.py: the code of other owners would run with the rights of the backfill.
  FOR whose IN
    WITH RECURSIVE trusted(role) AS (
      SELECT oid FROM pg_roles WHERE rolname IN ('pg_database_owner', job) OR rolsuper
       UNION
      SELECT datdba FROM pg_database WHERE datname = current_database()
       UNION
      SELECT relowner FROM pg_class WHERE oid = contacts
       UNION
      -- Since PostgreSQL 16 a membership may allow nothing; before, there are no such columns.
      SELECT member FROM trusted JOIN pg_auth_members m ON roleid = role, to_jsonb(m) AS allows
       WHERE admin_option OR COALESCE((allows->>'inherit_option')::bool, true)
             OR COALESCE((allows->>'set_option')::bool, true)
    )
    SELECT format('%I.%I', nspname, relname) AS name, pg_get_userbyid(relowner) AS owner, conname
      FROM pg_constraint k JOIN pg_class c ON c.oid = conrelid JOIN pg_namespace n ON n.oid = relnamespace
     WHERE contype = 'f' AND relowner NOT IN (SELECT role FROM trusted)
       AND confrelid IN (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                          WHERE nspname = 'crm_backfill' OR nspname = app AND relname IN ('crm_contacts', 'crm_stage_history'))
     ORDER BY 1, 3
  LOOP
    RAISE EXCEPTION 'The table % of %, who is no superuser and owns neither the database nor crm_contacts, refers to '
      'a table that the backfill writes, and could have it call what its owner wants. Have a look at it. Then run % '
      'Nothing was changed.', whose.name, whose.owner,
      format('ALTER TABLE %1$s DROP CONSTRAINT %2$I; or ALTER TABLE %1$s OWNER TO ...;', whose.name, whose.conname);
  END LOOP;

  SELECT string_agg(format('%I.%I (owner %s)', nspname, relname, pg_get_userbyid(relowner)), ', '
                    ORDER BY nspname, relname)
    INTO others
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
   WHERE relkind IN ('r', 'p') AND NOT pg_has_role(relowner, 'USAGE')
     AND (nspname = 'crm_backfill'
          OR nspname = app AND (relname IN ('users', 'profiles', 'leads', 'tax_intake_leads', 'client_preparers')
                                OR relname = 'crm_contacts'
                                OR relname IN ('crm_interactions', 'crm_stage_history')
                                   AND current_setting('least_privilege.rollback')::bool
                                OR relname = 'crm_stage_history' AND current_setting('least_privilege.update')::bool)
          OR current_setting('least_privilege.rollback')::bool
             AND EXISTS (SELECT FROM pg_constraint WHERE contype = 'f' AND confrelid = contacts AND conrelid = c.oid));
  IF others IS NOT NULL THEN
    RAISE EXCEPTION 'The role % may grant nothing on %: run this as the owner, or as a superuser. Nothing was changed.',
      current_user, others;
  END IF;

  IF EXISTS (SELECT FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase
              WHERE setrole = job_oid AND datname = current_database()
                AND format('search_path=crm_backfill, %I', app) = ANY (setconfig)) THEN
    RETURN;
  END IF;
  IF job_oid IS NULL THEN
    making := format('CREATE ROLE %I LOGIN; ', job) || making;
  END IF;
  IF NOT EXISTS (SELECT FROM pg_roles
                  WHERE rolname = current_user
                    AND (rolsuper
                         OR rolcreaterole AND (job_oid IS NULL OR current_setting('server_version_num')::int < 160000
                                               OR pg_has_role(job_oid, 'USAGE WITH ADMIN OPTION')))) THEN
    RAISE EXCEPTION 'The role % may not make or change the role %. Let an administrator run once: % '
      'Then run this again. Nothing was changed.', current_user, job, making;
  END IF;
  EXECUTE making;
END
$$;

-- Revoke what was granted to the role in this database, by this script or otherwise, in any schema. Then check again:
-- only the grantor can revoke a right.
DO $$
DECLARE
  job text := current_setting('least_privilege.role');
  job_oid oid := (SELECT oid FROM pg_roles WHERE rolname = job);
  granted record;
  left_over text[] := '{}';
  of_grantors text[] := '{}';
  statements text[] := '{}';
BEGIN
  FOR pass IN 1..2 LOOP
    FOR granted IN
      -- Of a relation, ALL would name columns too, on which its grantor may have no say.
      SELECT format('REVOKE %s ON %s %s FROM %I CASCADE', string_agg(DISTINCT privilege_type, ', '),
                    CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::regclass, job) AS statement,
             grantor, relowner AS owner, c.oid::regclass::text AS name, false AS is_needed
        FROM pg_class c, aclexplode(relacl) WHERE grantee = job_oid GROUP BY c.oid, relkind, relowner, grantor
       UNION
      SELECT format('REVOKE %s ON TABLE %s FROM %I CASCADE',
                    string_agg(DISTINCT format('%s (%I)', privilege_type, attname), ', '), c.oid::regclass, job),
             grantor, relowner, c.oid::regclass::text, false
        FROM pg_class c JOIN pg_attribute ON attrelid = c.oid, aclexplode(attacl)
       WHERE grantee = job_oid AND NOT attisdropped GROUP BY c.oid, relowner, grantor
       UNION
      SELECT format('REVOKE ALL ON ROUTINE %s FROM %I CASCADE', oid::regprocedure, job), grantor, proowner,
             oid::regprocedure::text, false
        FROM pg_proc, aclexplode(proacl) WHERE grantee = job_oid
       UNION
      SELECT format('REVOKE ALL ON TYPE %I.%I FROM %I CASCADE', nspname, typname, job), grantor, typowner,
             format('type %I.%I', nspname, typname), false
        FROM pg_type t JOIN pg_namespace n ON n.oid = typnamespace, aclexplode(typacl) WHERE grantee = job_oid
       UNION
      SELECT format('REVOKE ALL ON LANGUAGE %I FROM %I CASCADE', lanname, job), grantor, lanowner,
             format('language %I', lanname), false
        FROM pg_language, aclexplode(lanacl) WHERE grantee = job_oid
       UNION
      SELECT format('REVOKE ALL ON FOREIGN DATA WRAPPER %I FROM %I CASCADE', fdwname, job), grantor, fdwowner,
             format('foreign-data wrapper %I', fdwname), false
        FROM pg_foreign_data_wrapper, aclexplode(fdwacl) WHERE grantee = job_oid
       UNION
      SELECT format('REVOKE ALL ON FOREIGN SERVER %I FROM %I CASCADE', srvname, job), grantor, srvowner,
             format('foreign server %I', srvname), false
        FROM pg_foreign_server, aclexplode(srvacl) WHERE grantee = job_oid
       UNION
      SELECT format('REVOKE ALL ON LARGE OBJECT %s FROM %I CASCADE', oid, job), grantor, lomowner,
             format('large object %s', oid), false
        FROM pg_largeobject_metadata, aclexplode(lomacl) WHERE grantee = job_oid
       UNION
      SELECT format('REVOKE ALL ON SCHEMA %I FROM %I CASCADE', nspname, job), grantor, nspowner,
             format('schema %I', nspname),
             nspname IN ('crm_backfill', current_setting('least_privilege.schema')) AND NOT EXISTS (
               SELECT FROM aclexplode(nspacl) WHERE grantee = job_oid AND (privilege_type <> 'USAGE' OR is_grantable))
        FROM pg_namespace, aclexplode(nspacl) WHERE grantee = job_oid
       UNION
      SELECT format('REVOKE ALL ON DATABASE %I FROM %I CASCADE', datname, job), grantor, datdba,
             format('database %I', datname),
             NOT EXISTS (
               SELECT FROM aclexplode(datacl) WHERE grantee = job_oid AND (privilege_type <> 'CONNECT' OR is_grantable))
        FROM pg_database, aclexplode(datacl) WHERE datname = current_database() AND grantee = job_oid
       UNION
      SELECT format('ALTER DEFAULT PRIVILEGES FOR ROLE %I%s REVOKE ALL ON %s FROM %I CASCADE',
                    pg_get_userbyid(defaclrole), ' IN SCHEMA ' || quote_ident(nspname),
                    CASE defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'ROUTINES'
                                       WHEN 'T' THEN 'TYPES' WHEN 'n' THEN 'SCHEMAS' WHEN 'L' THEN 'LARGE OBJECTS' END,
                    job),
             grantor, defaclrole, format('default privileges of %I', pg_get_userbyid(defaclrole)), false
        FROM pg_default_acl LEFT JOIN pg_namespace n ON n.oid = defaclnamespace, aclexplode(defaclacl)
       WHERE grantee = job_oid
    LOOP
      IF granted.owner = job_oid OR pass = 2 AND granted.is_needed THEN
        CONTINUE;
      ELSIF pass = 1 AND pg_has_role(granted.owner, 'USAGE') THEN
        EXECUTE granted.statement;
      ELSIF pass = 1 THEN
        CONTINUE;
      ELSIF granted.grantor = granted.owner THEN
        left_over := left_over || format('%s (owner %s)', granted.name, pg_get_userbyid(granted.owner));
      ELSE
        of_grantors := of_grantors || format('%s (granted by %s)', granted.name, pg_get_userbyid(granted.grantor));
        statements := statements
          || format('SET ROLE %I; %s; RESET ROLE;', pg_get_userbyid(granted.grantor), granted.statement);
      END IF;
    END LOOP;
  END LOOP;
  IF left_over <> '{}' THEN
    RAISE EXCEPTION 'The role % has rights on % that only the owner or a superuser can revoke: run this as one of '
      'them. Nothing was changed.', job, array_to_string(left_over, ', ');
  END IF;
  IF of_grantors <> '{}' THEN
    RAISE EXCEPTION 'The role % has rights on % that another role than the owner granted, and only the grantor can '
      'revoke them: as a superuser, run % Then run this again. Nothing was changed.',
      job, array_to_string(of_grantors, ', '), array_to_string(statements, ' ');
  END IF;
END
$$;

-- Skip what the role already has: perhaps only another role can grant it.
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', datname, :'role')
  FROM pg_database
 WHERE datname = current_database()
   AND (pg_has_role(datdba, 'USAGE') OR NOT has_database_privilege(:'role', oid, 'CONNECT'))
 UNION ALL
SELECT format('GRANT USAGE ON SCHEMA %I TO %I', nspname, :'role')
  FROM pg_namespace
 WHERE nspname IN (:'schema', 'crm_backfill')
   AND (pg_has_role(nspowner, 'USAGE') OR NOT has_schema_privilege(:'role', oid, 'USAGE'))
\gexec

-- The application's tables, column by column: other columns can be neither read nor written. Tables and columns that a
-- generation of the application lacks are skipped.
WITH wanted (table_name, privilege, columns) AS (
  VALUES
    ('users', 'SELECT', ARRAY['id', 'name', 'email', 'createdAt', 'updatedAt']),
    ('profiles', 'SELECT', ARRAY[
      'id', 'userId', 'clerkUserId', 'role', 'firstName', 'lastName', 'phone', 'companyName', 'email', 'trackingCode',
      'customTrackingCode', 'shortLinkUsername', 'createdAt', 'updatedAt'
    ]),
    ('client_preparers', 'SELECT', ARRAY['id', 'clientId', 'preparerId', 'assignedAt', 'isActive']),
    ('leads', 'SELECT', ARRAY[
      'id', 'type', 'status', 'firstName', 'lastName', 'email', 'phone', 'source', 'assignedPreparerId',
      'lastContactedAt', 'createdAt', 'updatedAt', 'referrerUsername', 'referrerType', 'commissionRate',
      'commissionRateLockedAt', 'attributionMethod', 'attributionConfidence'
    ]),
    ('tax_intake_leads', 'SELECT', ARRAY[
      'id', 'first_name', 'last_name', 'email', 'phone', 'country_code', 'referrerUsername', 'referrerType',
      'attributionMethod', 'assignedPreparerId', 'lastContactedAt', 'profileId', 'convertedToClient', 'convertedAt',
      'unqualified', 'unqualifiedAt', 'created_at', 'updated_at'
    ]),
    -- By the system column xmin, a rollback detects that a contact changed after it was assessed.
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
    -- The columns that a merge can fill.
    ('crm_contacts', 'UPDATE', ARRAY[
      'userId', 'clerkUserId', 'phone', 'company', 'assignedPreparerId', 'assignedAt', 'referrerUsername',
      'referrerType', 'commissionRate', 'commissionRateLockedAt', 'attributionMethod', 'attributionConfidence',
      'lastContactedAt'
    ])
)
SELECT format('GRANT %s (%s) ON %I.%I TO %I', privilege, string_agg(quote_ident(attname), ', ' ORDER BY attnum),
              :'schema', table_name, :'role')
  FROM wanted
  JOIN pg_attribute ON attrelid = to_regclass(format('%I.%I', :'schema', table_name))
                   AND attname = ANY (columns) AND NOT attisdropped
 GROUP BY table_name, privilege
\gexec

-- The tables of the backfill.
GRANT SELECT, INSERT, UPDATE ON crm_backfill.backfill_run, crm_backfill.ledger_entry TO :"role";
GRANT SELECT, INSERT ON crm_backfill.backfill_batch, crm_backfill.contact_update TO :"role";
-- To find out whether a commit succeeded whose answer was lost.
GRANT SELECT, INSERT, DELETE ON crm_backfill.committed_transaction TO :"role";
-- Runs read the resolutions of conflicts; resolve_crm_conflict records them under this role, too.
GRANT SELECT, INSERT, UPDATE ON crm_backfill.conflict_decision TO :"role";
-- The list of runs and the trace of a contact show rollbacks.
GRANT SELECT ON crm_backfill.rollback TO :"role";
-- The function that writes contacts runs with the rights of its caller; by default, everyone can execute it.
SELECT format('GRANT EXECUTE ON FUNCTION crm_backfill.try_execute(text, text[]) TO %I', :'role')
 WHERE NOT has_function_privilege(:'role', 'crm_backfill.try_execute(text, text[])', 'EXECUTE')
\gexec

\if :update
  -- OPTIONAL: updates. An unmodified contact becomes what its rows say: name, type and origin are written again, a
  -- placeholder email is replaced, and the stage moves forward, with an entry in its history. Repairs of types and
  -- addresses need no more than that.
  GRANT UPDATE ("firstName", "lastName", "email", "contactType", "source", "stage", "stageEnteredAt")
     ON :"schema".crm_contacts TO :"role";
  GRANT INSERT ("id", "contactId", "fromStage", "toStage", "reason", "createdAt") ON :"schema".crm_stage_history
     TO :"role";
\endif

\if :rollback
  -- OPTIONAL: rollbacks. A contact is deleted only if no column was changed or filled since and no row of any table
  -- refers to it; so the role must be able to read all of that.
  GRANT SELECT, DELETE ON :"schema".crm_contacts TO :"role";
  GRANT DELETE ON crm_backfill.ledger_entry, crm_backfill.contact_update TO :"role";
  \if :update
    -- Reversing a promotion deletes its entry in the history.
    GRANT SELECT ("id"), DELETE ON :"schema".crm_stage_history TO :"role";
  \endif
  GRANT INSERT, UPDATE ON crm_backfill.rollback TO :"role";
  SELECT CASE WHEN NOT has_schema_privilege(:'role', nspname, 'USAGE')
              THEN format('GRANT USAGE ON SCHEMA %I TO %I', nspname, :'role') END,
         format('GRANT SELECT (%s) ON %s TO %I', string_agg(quote_ident(attname), ', '), conrelid::regclass, :'role')
    FROM pg_constraint
    JOIN pg_class ON pg_class.oid = conrelid
    JOIN pg_namespace ON pg_namespace.oid = relnamespace
    JOIN pg_attribute ON attrelid = conrelid AND attnum = ANY (conkey)
   WHERE contype = 'f' AND confrelid = format('%I.crm_contacts', :'schema')::regclass
   GROUP BY conrelid, nspname
  \gexec
  -- The application's tables that refer to contacts, if Prisma manages the relations without foreign keys.
  SELECT format('GRANT SELECT ("contactId") ON %s TO %I', attrelid::regclass, :'role')
    FROM pg_attribute
   WHERE attrelid IN (to_regclass(format('%I.crm_interactions', :'schema')),
                      to_regclass(format('%I.crm_stage_history', :'schema')))
     AND attname = 'contactId' AND NOT attisdropped
  \gexec
\endif

COMMIT;

\echo Granted to :role on the schema :schema. Optional rights: update :update, rollback :rollback.
