"""The application's tables `users`, `profiles`, `leads` and `tax_intake_leads`. Prisma owns them; they are only read.

The models have the columns that the backfill and the admin need and that every generation has. Excluded on purpose are
the secret columns (`ssn`, `dateOfBirth`, `address`, `bankDetails`, `hashedPassword`, and the form, address and notes of
an intake), so that no query can fetch them by accident, and the columns that only some generations have, which
`crm.backfill.read.source` reads where they exist.
"""

from __future__ import annotations

from typing import Any, NoReturn

from django.db import models

from crm.fields import PostgresEnumField, RateField, TimestampField


class ReadOnlyError(TypeError):
    """Raised by an attempt to write a read-only table."""

    def __init__(self, table: str) -> None:
        super().__init__(f"{table} belongs to the application and is read-only here.")


class ReadOnlyQuerySet(models.QuerySet[Any]):
    """A queryset whose write methods raise ReadOnlyError."""

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise ReadOnlyError(self.model._meta.db_table)

    create = update = delete = bulk_create = bulk_update = get_or_create = update_or_create = _refuse
    acreate = aupdate = adelete = abulk_create = abulk_update = aget_or_create = aupdate_or_create = _refuse
    # Django's internal methods, which code that bypasses `save` uses, such as loaddata.
    _insert = _update = _raw_delete = _refuse


class ReadOnlyModel(models.Model):
    """A row of a read-only table: `save` and `delete` raise ReadOnlyError."""

    objects = ReadOnlyQuerySet.as_manager()

    class Meta:
        abstract = True
        # Django's default base manager could write.
        base_manager_name = "objects"

    def save(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        raise ReadOnlyError(self._meta.db_table)

    def delete(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        raise ReadOnlyError(self._meta.db_table)


class User(ReadOnlyModel):
    """A user account of the application."""

    id = models.TextField(primary_key=True)
    email = models.TextField(unique=True)
    email_verified = TimestampField(db_column="emailVerified", null=True)
    created_at = TimestampField(db_column="createdAt")
    updated_at = TimestampField(db_column="updatedAt")

    class Meta:
        managed = False
        db_table = "users"

    def __str__(self) -> str:
        return f"users:{self.pk}"


class Profile(ReadOnlyModel):
    """A person with a role. `user_id` may be missing in 2025_10."""

    id = models.TextField(primary_key=True)
    user_id = models.TextField(db_column="userId", null=True, unique=True)
    role = PostgresEnumField(enum="UserRole")
    first_name = models.TextField(db_column="firstName", null=True)
    last_name = models.TextField(db_column="lastName", null=True)
    phone = models.TextField(null=True)
    company_name = models.TextField(db_column="companyName", null=True)
    created_at = TimestampField(db_column="createdAt")
    updated_at = TimestampField(db_column="updatedAt")

    class Meta:
        managed = False
        db_table = "profiles"

    def __str__(self) -> str:
        return f"profiles:{self.pk}"


class Lead(ReadOnlyModel):
    """A person who submitted a lead form, with the attribution for commissions."""

    id = models.TextField(primary_key=True)
    type = PostgresEnumField(enum="LeadType")
    status = PostgresEnumField(enum="LeadStatus")
    first_name = models.TextField(db_column="firstName")
    last_name = models.TextField(db_column="lastName")
    email = models.TextField()
    phone = models.TextField()
    source = models.TextField(null=True)
    referrer_username = models.TextField(db_column="referrerUsername", null=True)
    referrer_type = models.TextField(db_column="referrerType", null=True)
    commission_rate = RateField(db_column="commissionRate", null=True)
    commission_rate_locked_at = TimestampField(db_column="commissionRateLockedAt", null=True)
    attribution_method = models.TextField(db_column="attributionMethod", null=True)
    attribution_confidence = models.IntegerField(db_column="attributionConfidence")
    assigned_preparer_id = models.TextField(db_column="assignedPreparerId", null=True)
    last_contacted_at = TimestampField(db_column="lastContactedAt", null=True)
    created_at = TimestampField(db_column="createdAt")
    updated_at = TimestampField(db_column="updatedAt")

    class Meta:
        managed = False
        db_table = "leads"

    def __str__(self) -> str:
        return f"leads:{self.pk}"


class TaxIntakeLead(ReadOnlyModel):
    """What a person entered in the tax form. Some databases lack the table."""

    id = models.TextField(primary_key=True)
    first_name = models.TextField()
    last_name = models.TextField()
    email = models.TextField()
    phone = models.TextField()
    created_at = TimestampField()
    updated_at = TimestampField()

    class Meta:
        managed = False
        db_table = "tax_intake_leads"

    def __str__(self) -> str:
        return f"tax_intake_leads:{self.pk}"
