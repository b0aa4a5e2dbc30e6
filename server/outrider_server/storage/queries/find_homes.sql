-- Where tenants live, by name or by id. Locks: none.
SELECT id, name, shards FROM tenant
WHERE deleted_at IS NULL AND (name = ANY($1::text[]) OR id = ANY($2::integer[]))
