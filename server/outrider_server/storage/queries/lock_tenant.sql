-- Begin a change of a tenant's configuration: raise its version, and hold its row until the transaction ends, so that
-- the changes of a tenant follow each other and versions become visible in order. Not a key update: rows that refer to
-- the tenant can be written meanwhile.
-- Locks: the tenant, always before its endpoints, subscriptions and event types.
UPDATE tenant SET config_version = config_version + 1
WHERE id = $1 AND deleted_at IS NULL
RETURNING id, name, shard, shards, former_shards, frozen_until, display_name, strict_types, config_version, version, created_at,
    updated_at,
    clock_timestamp() AS now
