-- The application's tables as of November 2025: roles in lower case, no Clerk id on profiles, every profile has a
-- user, the pipeline can lose a contact, contacts have a lead score.

CREATE TYPE "UserRole" AS ENUM ('super_admin', 'admin', 'lead', 'client', 'tax_preparer', 'affiliate');
CREATE TYPE "LeadType" AS ENUM ('CUSTOMER', 'TAX_PREPARER', 'AFFILIATE');
CREATE TYPE "LeadStatus" AS ENUM ('NEW', 'CONTACTED', 'QUALIFIED', 'CONVERTED', 'DISQUALIFIED');
CREATE TYPE "ContactType" AS ENUM ('CLIENT', 'LEAD', 'AFFILIATE', 'PREPARER');
CREATE TYPE "PipelineStage" AS ENUM ('NEW', 'CONTACTED', 'QUALIFIED', 'DOCUMENTS', 'FILED', 'CLOSED', 'LOST');
CREATE TYPE "InteractionType" AS ENUM ('EMAIL', 'PHONE_CALL', 'MEETING', 'NOTE', 'OTHER');
CREATE TYPE "Direction" AS ENUM ('INBOUND', 'OUTBOUND');

CREATE TABLE "users" (
    "id" TEXT NOT NULL,
    "name" TEXT,
    "email" TEXT NOT NULL,
    "emailVerified" TIMESTAMP(3),
    "image" TEXT,
    "hashedPassword" TEXT,
    "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updatedAt" TIMESTAMP(3) NOT NULL,

    CONSTRAINT "users_pkey" PRIMARY KEY ("id")
);

CREATE TABLE "profiles" (
    "id" TEXT NOT NULL,
    "userId" TEXT NOT NULL,
    "role" "UserRole" NOT NULL,
    "firstName" TEXT,
    "lastName" TEXT,
    "middleName" TEXT,
    "phone" TEXT,
    "vanitySlug" TEXT,
    "avatarUrl" TEXT,
    "bio" TEXT,
    "companyName" TEXT,
    "licenseNo" TEXT,
    "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updatedAt" TIMESTAMP(3) NOT NULL,
    "trackingCode" TEXT,
    "customTrackingCode" TEXT,
    "trackingCodeChanged" BOOLEAN NOT NULL DEFAULT false,
    "trackingCodeFinalized" BOOLEAN NOT NULL DEFAULT false,
    "trackingCodeQRUrl" TEXT,
    "qrCodeLogoUrl" TEXT,
    "shortLinkUsername" TEXT,
    "shortLinkUsernameChanged" BOOLEAN NOT NULL DEFAULT false,
    "affiliateBondedToPreparerId" TEXT,
    "bookingEnabled" BOOLEAN NOT NULL DEFAULT true,
    "allowPhoneBookings" BOOLEAN NOT NULL DEFAULT true,
    "allowVideoBookings" BOOLEAN NOT NULL DEFAULT true,
    "allowInPersonBookings" BOOLEAN NOT NULL DEFAULT true,
    "requireApprovalForBookings" BOOLEAN NOT NULL DEFAULT false,
    "customBookingMessage" TEXT,
    "bookingCalendarColor" TEXT,
    "usePhotoInQRCodes" BOOLEAN NOT NULL DEFAULT false,
    "professionalTitle" TEXT,
    "website" TEXT,
    "publicAddress" TEXT,
    "ssn" TEXT,
    "dateOfBirth" TEXT,
    "address" JSONB,
    "bankDetails" JSONB,

    CONSTRAINT "profiles_pkey" PRIMARY KEY ("id")
);

CREATE TABLE "leads" (
    "id" TEXT NOT NULL,
    "type" "LeadType" NOT NULL,
    "status" "LeadStatus" NOT NULL DEFAULT 'NEW',
    "firstName" TEXT NOT NULL,
    "lastName" TEXT NOT NULL,
    "email" TEXT NOT NULL,
    "phone" TEXT NOT NULL,
    "taxSituation" TEXT,
    "estimatedIncome" TEXT,
    "ptin" TEXT,
    "certification" TEXT,
    "experience" TEXT,
    "marketingExperience" TEXT,
    "audience" TEXT,
    "message" TEXT,
    "source" TEXT,
    "utmSource" TEXT,
    "utmMedium" TEXT,
    "utmCampaign" TEXT,
    "ipAddress" TEXT,
    "userAgent" TEXT,
    "referrerUsername" TEXT,
    "referrerType" TEXT,
    "commissionRate" DECIMAL(5,2),
    "commissionRateLockedAt" TIMESTAMP(3),
    "attributionMethod" TEXT,
    "attributionCookieId" TEXT,
    "attributionConfidence" INTEGER NOT NULL DEFAULT 100,
    "assignedPreparerId" TEXT,
    "contactRequested" BOOLEAN NOT NULL DEFAULT false,
    "contactMethod" TEXT,
    "lastContactedAt" TIMESTAMP(3),
    "contactNotes" TEXT,
    "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updatedAt" TIMESTAMP(3) NOT NULL,

    CONSTRAINT "leads_pkey" PRIMARY KEY ("id")
);

CREATE TABLE "tax_intake_leads" (
    "id" TEXT NOT NULL,
    "first_name" TEXT NOT NULL,
    "middle_name" TEXT,
    "last_name" TEXT NOT NULL,
    "email" TEXT NOT NULL,
    "phone" TEXT NOT NULL,
    "country_code" TEXT NOT NULL DEFAULT '+1',
    "address_line_1" TEXT,
    "address_line_2" TEXT,
    "city" TEXT,
    "state" TEXT,
    "zip_code" TEXT,
    "full_form_data" JSONB,
    "completed" BOOLEAN NOT NULL DEFAULT false,
    "referrerUsername" TEXT,
    "referrerType" TEXT,
    "attributionMethod" TEXT,
    "assignedPreparerId" TEXT,
    "contactRequested" BOOLEAN NOT NULL DEFAULT false,
    "contactMethod" TEXT,
    "lastContactedAt" TIMESTAMP(3),
    "contactNotes" TEXT,
    "profileId" TEXT,
    "convertedToClient" BOOLEAN NOT NULL DEFAULT false,
    "taxReturnId" TEXT,
    "convertedAt" TIMESTAMP(3),
    "created_at" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updated_at" TIMESTAMP(3) NOT NULL,

    CONSTRAINT "tax_intake_leads_pkey" PRIMARY KEY ("id")
);

CREATE TABLE "client_preparers" (
    "id" TEXT NOT NULL,
    "clientId" TEXT NOT NULL,
    "preparerId" TEXT NOT NULL,
    "assignedAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "isActive" BOOLEAN NOT NULL DEFAULT true,

    CONSTRAINT "client_preparers_pkey" PRIMARY KEY ("id")
);

CREATE TABLE "crm_contacts" (
    "id" TEXT NOT NULL,
    "userId" TEXT,
    "clerkUserId" TEXT,
    "contactType" "ContactType" NOT NULL,
    "firstName" TEXT NOT NULL,
    "lastName" TEXT NOT NULL,
    "email" TEXT NOT NULL,
    "phone" TEXT,
    "company" TEXT,
    "filingStatus" TEXT,
    "dependents" INTEGER,
    "previousYearAGI" DOUBLE PRECISION,
    "taxYear" INTEGER,
    "stage" "PipelineStage" NOT NULL DEFAULT 'NEW',
    "stageEnteredAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "source" TEXT,
    "assignedPreparerId" TEXT,
    "assignedAt" TIMESTAMP(3),
    "referrerUsername" TEXT,
    "referrerType" TEXT,
    "commissionRate" DECIMAL(5,2),
    "commissionRateLockedAt" TIMESTAMP(3),
    "attributionMethod" TEXT,
    "attributionConfidence" INTEGER NOT NULL DEFAULT 100,
    "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updatedAt" TIMESTAMP(3) NOT NULL,
    "lastContactedAt" TIMESTAMP(3),
    "leadScore" INTEGER NOT NULL DEFAULT 0,
    "lastScoredAt" TIMESTAMP(3),

    CONSTRAINT "crm_contacts_pkey" PRIMARY KEY ("id")
);

CREATE TABLE "crm_interactions" (
    "id" TEXT NOT NULL,
    "contactId" TEXT NOT NULL,
    "userId" TEXT,
    "clerkUserId" TEXT,
    "type" "InteractionType" NOT NULL,
    "direction" "Direction" NOT NULL DEFAULT 'OUTBOUND',
    "subject" TEXT,
    "body" TEXT,
    "duration" INTEGER,
    "emailId" TEXT,
    "emailThreadId" TEXT,
    "emailTo" TEXT[],
    "emailCc" TEXT[],
    "emailBcc" TEXT[],
    "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updatedAt" TIMESTAMP(3) NOT NULL,
    "occurredAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "attachments" JSONB,

    CONSTRAINT "crm_interactions_pkey" PRIMARY KEY ("id")
);

CREATE TABLE "crm_stage_history" (
    "id" TEXT NOT NULL,
    "contactId" TEXT NOT NULL,
    "fromStage" "PipelineStage",
    "toStage" "PipelineStage" NOT NULL,
    "changedBy" TEXT,
    "changedByClerk" TEXT,
    "reason" TEXT,
    "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,

    CONSTRAINT "crm_stage_history_pkey" PRIMARY KEY ("id")
);

CREATE UNIQUE INDEX "users_email_key" ON "users" ("email");

CREATE UNIQUE INDEX "profiles_customTrackingCode_key" ON "profiles" ("customTrackingCode");
CREATE UNIQUE INDEX "profiles_shortLinkUsername_key" ON "profiles" ("shortLinkUsername");
CREATE UNIQUE INDEX "profiles_trackingCode_key" ON "profiles" ("trackingCode");
CREATE UNIQUE INDEX "profiles_userId_key" ON "profiles" ("userId");
CREATE UNIQUE INDEX "profiles_vanitySlug_key" ON "profiles" ("vanitySlug");
CREATE INDEX "profiles_affiliateBondedToPreparerId_idx" ON "profiles" ("affiliateBondedToPreparerId");
CREATE INDEX "profiles_customTrackingCode_idx" ON "profiles" ("customTrackingCode");
CREATE INDEX "profiles_role_idx" ON "profiles" ("role");
CREATE INDEX "profiles_shortLinkUsername_idx" ON "profiles" ("shortLinkUsername");
CREATE INDEX "profiles_trackingCode_idx" ON "profiles" ("trackingCode");
CREATE INDEX "profiles_vanitySlug_idx" ON "profiles" ("vanitySlug");

CREATE INDEX "leads_assignedPreparerId_idx" ON "leads" ("assignedPreparerId");
CREATE INDEX "leads_attributionMethod_idx" ON "leads" ("attributionMethod");
CREATE INDEX "leads_commissionRateLockedAt_idx" ON "leads" ("commissionRateLockedAt");
CREATE INDEX "leads_contactRequested_idx" ON "leads" ("contactRequested");
CREATE INDEX "leads_createdAt_idx" ON "leads" ("createdAt");
CREATE INDEX "leads_email_idx" ON "leads" ("email");
CREATE INDEX "leads_referrerUsername_idx" ON "leads" ("referrerUsername");
CREATE INDEX "leads_status_idx" ON "leads" ("status");
CREATE INDEX "leads_type_idx" ON "leads" ("type");

CREATE UNIQUE INDEX "tax_intake_leads_email_key" ON "tax_intake_leads" ("email");
CREATE INDEX "tax_intake_leads_assignedPreparerId_idx" ON "tax_intake_leads" ("assignedPreparerId");
CREATE INDEX "tax_intake_leads_attributionMethod_idx" ON "tax_intake_leads" ("attributionMethod");
CREATE INDEX "tax_intake_leads_completed_idx" ON "tax_intake_leads" ("completed");
CREATE INDEX "tax_intake_leads_contactRequested_idx" ON "tax_intake_leads" ("contactRequested");
CREATE INDEX "tax_intake_leads_convertedToClient_idx" ON "tax_intake_leads" ("convertedToClient");
CREATE INDEX "tax_intake_leads_created_at_idx" ON "tax_intake_leads" ("created_at");
CREATE INDEX "tax_intake_leads_email_idx" ON "tax_intake_leads" ("email");
CREATE INDEX "tax_intake_leads_profileId_idx" ON "tax_intake_leads" ("profileId");
CREATE INDEX "tax_intake_leads_referrerUsername_idx" ON "tax_intake_leads" ("referrerUsername");
CREATE INDEX "tax_intake_leads_taxReturnId_idx" ON "tax_intake_leads" ("taxReturnId");

CREATE UNIQUE INDEX "client_preparers_clientId_preparerId_key" ON "client_preparers" ("clientId", "preparerId");
CREATE INDEX "client_preparers_clientId_idx" ON "client_preparers" ("clientId");
CREATE INDEX "client_preparers_preparerId_idx" ON "client_preparers" ("preparerId");

CREATE UNIQUE INDEX "crm_contacts_clerkUserId_key" ON "crm_contacts" ("clerkUserId");
CREATE UNIQUE INDEX "crm_contacts_email_key" ON "crm_contacts" ("email");
CREATE UNIQUE INDEX "crm_contacts_userId_key" ON "crm_contacts" ("userId");
CREATE INDEX "crm_contacts_assignedPreparerId_idx" ON "crm_contacts" ("assignedPreparerId");
CREATE INDEX "crm_contacts_contactType_idx" ON "crm_contacts" ("contactType");
CREATE INDEX "crm_contacts_email_idx" ON "crm_contacts" ("email");
CREATE INDEX "crm_contacts_lastContactedAt_idx" ON "crm_contacts" ("lastContactedAt");
CREATE INDEX "crm_contacts_leadScore_idx" ON "crm_contacts" ("leadScore");
CREATE INDEX "crm_contacts_referrerUsername_idx" ON "crm_contacts" ("referrerUsername");
CREATE INDEX "crm_contacts_stage_idx" ON "crm_contacts" ("stage");
CREATE INDEX "crm_contacts_userId_idx" ON "crm_contacts" ("userId");

CREATE UNIQUE INDEX "crm_interactions_emailId_key" ON "crm_interactions" ("emailId");
CREATE INDEX "crm_interactions_contactId_occurredAt_idx" ON "crm_interactions" ("contactId", "occurredAt" DESC);
CREATE INDEX "crm_interactions_emailThreadId_idx" ON "crm_interactions" ("emailThreadId");
CREATE INDEX "crm_interactions_type_idx" ON "crm_interactions" ("type");
CREATE INDEX "crm_interactions_userId_idx" ON "crm_interactions" ("userId");

CREATE INDEX "crm_stage_history_changedByClerk_idx" ON "crm_stage_history" ("changedByClerk");
CREATE INDEX "crm_stage_history_contactId_createdAt_idx" ON "crm_stage_history" ("contactId", "createdAt" DESC);

ALTER TABLE "profiles" ADD CONSTRAINT "profiles_userId_fkey"
    FOREIGN KEY ("userId") REFERENCES "users"("id") ON DELETE CASCADE ON UPDATE CASCADE;
ALTER TABLE "tax_intake_leads" ADD CONSTRAINT "tax_intake_leads_profileId_fkey"
    FOREIGN KEY ("profileId") REFERENCES "profiles"("id") ON DELETE SET NULL ON UPDATE CASCADE;
ALTER TABLE "client_preparers" ADD CONSTRAINT "client_preparers_clientId_fkey"
    FOREIGN KEY ("clientId") REFERENCES "profiles"("id") ON DELETE CASCADE ON UPDATE CASCADE;
ALTER TABLE "client_preparers" ADD CONSTRAINT "client_preparers_preparerId_fkey"
    FOREIGN KEY ("preparerId") REFERENCES "profiles"("id") ON DELETE CASCADE ON UPDATE CASCADE;
ALTER TABLE "crm_contacts" ADD CONSTRAINT "crm_contacts_userId_fkey"
    FOREIGN KEY ("userId") REFERENCES "users"("id") ON DELETE SET NULL ON UPDATE CASCADE;
ALTER TABLE "crm_interactions" ADD CONSTRAINT "crm_interactions_contactId_fkey"
    FOREIGN KEY ("contactId") REFERENCES "crm_contacts"("id") ON DELETE CASCADE ON UPDATE CASCADE;
ALTER TABLE "crm_interactions" ADD CONSTRAINT "crm_interactions_userId_fkey"
    FOREIGN KEY ("userId") REFERENCES "users"("id") ON DELETE SET NULL ON UPDATE CASCADE;
ALTER TABLE "crm_stage_history" ADD CONSTRAINT "crm_stage_history_contactId_fkey"
    FOREIGN KEY ("contactId") REFERENCES "crm_contacts"("id") ON DELETE CASCADE ON UPDATE CASCADE;
