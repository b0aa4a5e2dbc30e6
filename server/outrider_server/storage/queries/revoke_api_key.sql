-- Revoke a key, once. Locks: the key.
UPDATE api_key SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL
RETURNING id, tenant, role, display_name, created_at, expires_at, revoked_at
