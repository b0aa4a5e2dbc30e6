-- Shards by how few tenants live there. Locks: none.
SELECT shard.shard FROM shard LEFT JOIN tenant ON shard.shard = ANY(tenant.shards) AND tenant.deleted_at IS NULL
GROUP BY shard.shard ORDER BY count(tenant.id), shard.shard
