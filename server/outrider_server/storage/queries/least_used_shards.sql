-- Shards by how few tenants live there, and among equals by how few live at their node: tenants are spread over the nodes, too.
-- Locks: none.
SELECT shard.shard
FROM shard LEFT JOIN tenant ON shard.shard = ANY(tenant.shards) AND tenant.deleted_at IS NULL
GROUP BY shard.shard, shard.node
ORDER BY count(tenant.id), sum(count(tenant.id)) OVER (PARTITION BY shard.node), shard.shard
