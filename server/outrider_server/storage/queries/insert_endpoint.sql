-- Make an endpoint and its first revision; no row where the name is taken.
-- Locks: the endpoint, under its tenant's lock.
WITH made AS (
    INSERT INTO endpoint (id, tenant, name, display_name, settings, sealed) OVERRIDING SYSTEM VALUE
    VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (tenant, name) WHERE deleted_at IS NULL DO NOTHING
    RETURNING id, tenant, name, version, state, display_name, settings, sealed, created_at, updated_at
), revision AS (
    INSERT INTO endpoint_revision (endpoint, version, tenant, config_version, state, settings, sealed)
    SELECT id, version, tenant, $7, state, settings, sealed FROM made
)
SELECT id, tenant, name, version, state, display_name, settings, sealed, created_at, updated_at FROM made
