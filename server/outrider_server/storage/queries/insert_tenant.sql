-- Make a tenant on the shard with the fewest of them, of those given; no row where the name is taken, also by a deleted
-- tenant. Locks: the new tenant, after lock_installation.
INSERT INTO tenant (name, shard, shards, display_name, strict_types)
SELECT $1, least_used.shard, ARRAY[least_used.shard], $2, $3
FROM (
    SELECT shard.shard FROM shard LEFT JOIN tenant ON tenant.shard = shard.shard AND tenant.deleted_at IS NULL
    WHERE shard.shard = ANY($4::smallint[])
    GROUP BY shard.shard ORDER BY count(tenant.id), shard.shard LIMIT 1
) AS least_used
ON CONFLICT (name) DO NOTHING
RETURNING id, name, shard, shards, former_shards, frozen_until, display_name, strict_types, config_version, version, created_at,
    updated_at
