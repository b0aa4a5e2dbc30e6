-- Which of the given keys do not hold any more. Locks: none.
SELECT asked.id, coalesce(api_key.revoked_at IS NOT NULL, false) AS revoked
FROM unnest($1::text[]) AS asked (id) LEFT JOIN api_key ON api_key.id = asked.id
WHERE api_key.id IS NULL OR api_key.revoked_at IS NOT NULL OR api_key.expires_at <= now()
