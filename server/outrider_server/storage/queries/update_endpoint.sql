-- Change an endpoint, or delete it softly (state 4), and keep the revision that results.
-- Locks: the endpoint, under its tenant's lock.
WITH changed AS (
    UPDATE endpoint SET version = version + 1, state = $2, display_name = $3, settings = $4, sealed = $5,
        updated_at = now(), deleted_at = CASE WHEN $2::smallint = 4 THEN now() END
    WHERE id = $1
    RETURNING id, tenant, name, version, state, display_name, settings, sealed, created_at, updated_at
), revision AS (
    INSERT INTO endpoint_revision (endpoint, version, tenant, config_version, state, settings, sealed)
    SELECT id, version, tenant, $6, state, settings, sealed FROM changed
)
SELECT id, tenant, name, version, state, display_name, settings, sealed, created_at, updated_at FROM changed
