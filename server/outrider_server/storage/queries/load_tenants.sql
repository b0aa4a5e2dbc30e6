-- The tenants to configure: those of these shards, or the one of id $1. Locks: none; read with the other load_ statements in
-- one snapshot.
SELECT id, name, shard, shards, former_shards, frozen_until, spread_at, display_name, strict_types, config_version, now() AS now
FROM tenant
WHERE deleted_at IS NULL AND (id = $1 OR ($1::integer IS NULL AND (shards || former_shards) && $2::smallint[]))
ORDER BY id
