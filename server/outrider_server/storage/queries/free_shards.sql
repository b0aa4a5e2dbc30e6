-- The shards this node may take: its own, free ones, and those of nodes whose lease has expired; with their holders.
SELECT shard.shard, shard.node
FROM shard LEFT JOIN node ON node.name = shard.node
WHERE shard.node IS NULL OR shard.node = $1 OR node.name IS NULL OR node.expires_at < now()
ORDER BY shard.shard
