-- Make a key; no row where its id is taken. Locks: the key; its tenant FOR KEY SHARE.
INSERT INTO api_key (id, tenant, role, hash, display_name, expires_at)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (id) DO NOTHING
RETURNING id, tenant, role, display_name, created_at, expires_at, revoked_at
