-- Make a tenant on the shard with the fewest of them; no row where the name is taken, also by a deleted tenant.
-- Locks: the new tenant, after lock_installation.
INSERT INTO tenant (name, shard, display_name, strict_types)
SELECT $1, (
    SELECT shard.shard FROM shard LEFT JOIN tenant ON tenant.shard = shard.shard AND tenant.deleted_at IS NULL
    GROUP BY shard.shard ORDER BY count(tenant.id), shard.shard LIMIT 1
), $2, $3
ON CONFLICT (name) DO NOTHING
RETURNING id, name, shard, display_name, strict_types, config_version, version, created_at, updated_at
