-- Read a tenant by its name. Locks: none.
SELECT id, name, shard, shards, former_shards, frozen_until, display_name, strict_types, config_version, version, created_at,
    updated_at
FROM tenant WHERE name = $1 AND deleted_at IS NULL
