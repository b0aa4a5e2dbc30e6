-- Read a subscription by its tenant and name. Locks: none; a change reads it under its tenant's lock.
SELECT s.id, s.tenant, s.name, s.endpoint, s.version, s.state, s.display_name, s.types, s.filter, s.filter_ast,
    s.created_at, s.updated_at, endpoint.name AS endpoint_name
FROM subscription AS s JOIN endpoint ON endpoint.id = s.endpoint
WHERE s.tenant = $1 AND s.name = $2 AND s.deleted_at IS NULL
