-- Tenants with something in several shards, of which these are some, and their versions. Locks: none.
SELECT id, config_version FROM tenant
WHERE deleted_at IS NULL AND cardinality(shards) + cardinality(former_shards) > 1 AND (shards || former_shards) && $1::smallint[]
