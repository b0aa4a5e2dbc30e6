-- Count the keys of a tenant (or of none) that hold, for their limit. Locks: none of its own; under hold_tenant (or lock_installation) the number
-- is exact.
SELECT count(*) FROM api_key
WHERE tenant IS NOT DISTINCT FROM $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
