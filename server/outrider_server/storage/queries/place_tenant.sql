-- Spread a tenant that was just made, of which nothing exists yet. Locks: the tenant, which this transaction made.
UPDATE tenant SET shards = $2 WHERE id = $1
RETURNING id, name, shard, shards, former_shards, frozen_until, display_name, strict_types, config_version, version,
    created_at, updated_at
