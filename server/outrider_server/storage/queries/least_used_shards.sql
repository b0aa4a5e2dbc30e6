-- Shards and how many tenants live in each, the emptiest first. Locks: none.
SELECT shard.shard, count(tenant.id) AS tenants
FROM shard LEFT JOIN tenant ON shard.shard = ANY(tenant.shards) AND tenant.deleted_at IS NULL
GROUP BY shard.shard ORDER BY count(tenant.id), shard.shard
