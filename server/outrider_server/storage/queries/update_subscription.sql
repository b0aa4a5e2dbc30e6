-- Change a subscription, or delete it softly (state 3), and keep the revision that results.
-- Locks: the subscription, under its tenant's lock.
WITH changed AS (
    UPDATE subscription SET version = version + 1, state = $2, display_name = $3, types = $4, filter = $5,
        filter_ast = $6, updated_at = now(), deleted_at = CASE WHEN $2::smallint = 3 THEN now() END
    WHERE id = $1
    RETURNING id, tenant, name, endpoint, version, state, display_name, types, filter, filter_ast, created_at, updated_at
), revision AS (
    INSERT INTO subscription_revision (subscription, version, tenant, config_version, state, types, filter, filter_ast)
    SELECT id, version, tenant, $7, state, types, filter, filter_ast FROM changed
)
SELECT changed.*, endpoint.name AS endpoint_name FROM changed JOIN endpoint ON endpoint.id = changed.endpoint
