-- Read a key by its id. Locks: none.
SELECT id, tenant, role, display_name, created_at, expires_at, revoked_at FROM api_key WHERE id = $1
