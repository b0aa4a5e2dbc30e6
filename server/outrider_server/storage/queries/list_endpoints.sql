-- Read a page of a tenant's endpoints behind a name. Locks: none.
SELECT id, tenant, name, version, state, display_name, settings, sealed, created_at, updated_at
FROM endpoint WHERE tenant = $1 AND name > $2 AND deleted_at IS NULL ORDER BY name LIMIT $3
