"""The application, and the schema that its tables live in."""

from django.apps import AppConfig


class CrmConfig(AppConfig):
    """The backfill of the CRM's contacts."""

    name = "crm"
    verbose_name = "CRM"
    default_auto_field = "django.db.models.BigAutoField"
