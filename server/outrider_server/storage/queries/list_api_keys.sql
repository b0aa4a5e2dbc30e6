-- Read a page of the keys of a tenant, or of those of none, behind an id. Locks: none.
SELECT id, tenant, role, display_name, created_at, expires_at, revoked_at FROM api_key
WHERE tenant IS NOT DISTINCT FROM $1 AND id > $2 ORDER BY id LIMIT $3
