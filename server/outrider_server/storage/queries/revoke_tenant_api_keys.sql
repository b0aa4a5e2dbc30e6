-- Revoke every key of a tenant. Locks: the keys, after their tenant.
UPDATE api_key SET revoked_at = now() WHERE tenant = $1 AND revoked_at IS NULL
