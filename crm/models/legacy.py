"""The application's people: `users`, `profiles`, `leads`. Prisma owns these tables; here they are only read.

Mapped is what the backfill and the admin need and what every generation has. Left out on purpose: the secret columns
(`ssn`, `dateOfBirth`, `address`, `bankDetails`, `hashedPassword`), so that no query of ours can fetch one by accident;
and `profiles.clerkUserId`, which is gone after 2025_10 and is read by `crm.backfill.read.source` where it exists.
"""

from __future__ import annotations

from typing import Any, NoReturn

from django.db import models

from crm.fields import PostgresEnumField, RateField, TimestampField


class ReadOnlyError(TypeError):
    """Somebody tried to write a table that is only read."""

    def __init__(self, table: str) -> None:
        super().__init__(f"{table} belongs to the application and is only read here.")


class ReadOnlyQuerySet(models.QuerySet[Any]):
    """A queryset whose writing methods raise ReadOnlyError."""

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise ReadOnlyError(self.model._meta.db_table)

    create = update = delete = bulk_create = bulk_update = get_or_create = update_or_create = _refuse
    acreate = aupdate = adelete = abulk_create = abulk_update = aget_or_create = aupdate_or_create = _refuse
    # What Django itself goes through where it passes by `save`, as loaddata does.
    _insert = _update = _raw_delete = _refuse


class ReadOnlyModel(models.Model):
    """A row of a table that is only read: saving and deleting raise ReadOnlyError."""

    objects = ReadOnlyQuerySet.as_manager()

    class Meta:
        abstract = True
        # The one that Django would make otherwise can write.
        base_manager_name = "objects"

    def save(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse."""
        raise ReadOnlyError(self._meta.db_table)

    def delete(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse."""
        raise ReadOnlyError(self._meta.db_table)


class User(ReadOnlyModel):
    """An account of the application."""

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
    """Somebody who filled in a form, with the attribution that commissions are paid from."""

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
