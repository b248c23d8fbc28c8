"""The Django application of the backfill."""

from django.apps import AppConfig
from django.db.backends.signals import connection_created
from django.db.models.signals import post_migrate, pre_migrate

from crm.attribution import restore
from crm.postgres.arrays import use_fast_arrays
from crm.postgres.loaders import read_every_timestamp
from crm.postgres.own_schema import prepare
from crm.postgres.session import require_fitting


class CrmConfig(AppConfig):
    """The backfill of the CRM's contacts."""

    name = "crm"
    verbose_name = "CRM"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks, and the receivers of signals."""
        # The checks read the needed rights from the models, so they are imported after these.
        from crm import checks, file_checks  # noqa: F401 - registers them

        connection_created.connect(require_fitting, dispatch_uid="crm.postgres.session")
        connection_created.connect(read_every_timestamp, dispatch_uid="crm.postgres.loaders")
        connection_created.connect(use_fast_arrays, dispatch_uid="crm.postgres.arrays")
        # Django sends pre_migrate once per application, before it creates its table django_migrations.
        pre_migrate.connect(prepare, sender=self, dispatch_uid="crm.postgres.own_schema")
        post_migrate.connect(restore, sender=self, dispatch_uid="crm.attribution")
