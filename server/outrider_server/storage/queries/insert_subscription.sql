-- Make a subscription and its first revision; no row where the name is taken.
-- Locks: the subscription, under its tenant's lock; its endpoint FOR KEY SHARE.
WITH made AS (
    INSERT INTO subscription (tenant, name, endpoint, display_name, types, filter, filter_ast)
    VALUES ($1, $2, $3, $4, $5, $6, $7)
    ON CONFLICT (tenant, name) WHERE deleted_at IS NULL DO NOTHING
    RETURNING id, tenant, name, endpoint, version, state, display_name, types, filter, filter_ast, created_at, updated_at
), revision AS (
    INSERT INTO subscription_revision (subscription, version, tenant, config_version, state, types, filter, filter_ast)
    SELECT id, version, tenant, $8, state, types, filter, filter_ast FROM made
)
SELECT made.*, endpoint.name AS endpoint_name FROM made JOIN endpoint ON endpoint.id = made.endpoint
