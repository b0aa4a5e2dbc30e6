-- Read an endpoint by its tenant and name. Locks: none; a change reads it under its tenant's lock.
SELECT id, tenant, name, version, state, display_name, settings, sealed, created_at, updated_at
FROM endpoint WHERE tenant = $1 AND name = $2 AND deleted_at IS NULL
