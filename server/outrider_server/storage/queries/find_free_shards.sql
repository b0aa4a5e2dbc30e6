-- The shards that this node may take, by the lease that they were held under: none for its own and those of nobody, else
-- the expired one, whose expiry changes when its holder renews it after all. Locks: none.
SELECT DISTINCT holder.name, holder.boot, holder.expires_at
FROM shard LEFT JOIN node AS holder ON holder.name = shard.node AND shard.node <> $1
WHERE holder.name IS NULL OR holder.expires_at < now()
