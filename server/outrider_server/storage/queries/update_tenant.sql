-- Change a tenant's own fields. Locks: the tenant, which lock_tenant holds already.
UPDATE tenant SET display_name = $2, strict_types = $3, version = version + 1, updated_at = now()
WHERE id = $1
RETURNING id, name, shard, shards, former_shards, frozen_until, display_name, strict_types, config_version, version, created_at,
    updated_at
