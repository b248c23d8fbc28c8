"""The tables of the CRM, which Prisma owns: `crm_contacts`, `crm_interactions`, `crm_stage_history`.

`CRMContact` maps exactly the columns that the backfill writes, in the order of the table, because `bulk_create` writes
all mapped columns. Excluded on purpose are the tax data (`filingStatus`, `dependents`, `previousYearAGI`, `taxYear`),
which the backfill must not read, and columns that later generations add with a default (`leadScore`, `lastScoredAt`),
which PostgreSQL fills.
"""

from __future__ import annotations

from django.db import models

from crm.fields import PostgresEnumField, RateField, TimestampField
from crm.models.bulk import ColumnwiseQuerySet


class CRMContact(models.Model):
    """A person in the CRM."""

    id = models.TextField(primary_key=True)
    user_id = models.TextField(db_column="userId", null=True, unique=True)
    clerk_user_id = models.TextField(db_column="clerkUserId", null=True, unique=True)
    contact_type = PostgresEnumField(db_column="contactType", enum="ContactType")
    first_name = models.TextField(db_column="firstName")
    last_name = models.TextField(db_column="lastName")
    email = models.TextField(unique=True)
    phone = models.TextField(null=True)
    company = models.TextField(null=True)
    stage = PostgresEnumField(enum="PipelineStage")
    stage_entered_at = TimestampField(db_column="stageEnteredAt")
    source = models.TextField(null=True)
    assigned_preparer_id = models.TextField(db_column="assignedPreparerId", null=True)
    assigned_at = TimestampField(db_column="assignedAt", null=True)
    referrer_username = models.TextField(db_column="referrerUsername", null=True)
    referrer_type = models.TextField(db_column="referrerType", null=True)
    commission_rate = RateField(db_column="commissionRate", null=True)
    commission_rate_locked_at = TimestampField(db_column="commissionRateLockedAt", null=True)
    attribution_method = models.TextField(db_column="attributionMethod", null=True)
    attribution_confidence = models.IntegerField(db_column="attributionConfidence", default=100)
    created_at = TimestampField(db_column="createdAt")
    updated_at = TimestampField(db_column="updatedAt")
    last_contacted_at = TimestampField(db_column="lastContactedAt", null=True)

    objects = models.Manager()
    bulk = ColumnwiseQuerySet.as_manager()

    class Meta:
        managed = False
        db_table = "crm_contacts"
        verbose_name = "contact"

    def __str__(self) -> str:
        return str(self.pk)


class CRMInteraction(models.Model):
    """A call, an email, a meeting or a note. Its texts are not mapped, because nothing reads them."""

    id = models.TextField(primary_key=True)
    contact = models.ForeignKey(
        CRMContact, models.DO_NOTHING, db_column="contactId", db_constraint=False, related_name="interactions"
    )
    type = PostgresEnumField(enum="InteractionType")
    direction = PostgresEnumField(enum="Direction")
    occurred_at = TimestampField(db_column="occurredAt")

    class Meta:
        managed = False
        db_table = "crm_interactions"
        verbose_name = "interaction"

    def __str__(self) -> str:
        return str(self.pk)


class CRMStageHistory(models.Model):
    """A change of a contact's stage."""

    id = models.TextField(primary_key=True)
    contact = models.ForeignKey(
        CRMContact, models.DO_NOTHING, db_column="contactId", db_constraint=False, related_name="stage_history"
    )
    from_stage = PostgresEnumField(db_column="fromStage", enum="PipelineStage", null=True)
    to_stage = PostgresEnumField(db_column="toStage", enum="PipelineStage")
    changed_by = models.TextField(db_column="changedBy", null=True)
    reason = models.TextField(null=True)
    created_at = TimestampField(db_column="createdAt")

    class Meta:
        managed = False
        db_table = "crm_stage_history"
        verbose_name = "stage change"
        verbose_name_plural = "stage history"

    def __str__(self) -> str:
        return str(self.pk)
