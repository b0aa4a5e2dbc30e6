-- Find a key by its hash, and tell whether it holds. Locks: none.
SELECT id, tenant, role, revoked_at IS NOT NULL AS revoked, coalesce(expires_at <= now(), false) AS expired
FROM api_key WHERE hash = $1
