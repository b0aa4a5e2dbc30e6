-- Every shard and the lease it is held under. dead: whoever watched the holder's process saw it end. Locks: none.
SELECT shard.shard, shard.epoch, shard.node, shard.released, shard.crashes, shard.held_back, holder.boot,
    coalesce(holder.expires_at >= now(), false) AS live, coalesce(holder.expires_at = '-infinity', false) AS dead,
    holder.expires_at::text AS expires_at
FROM shard LEFT JOIN node AS holder ON holder.name = shard.node
ORDER BY shard.shard
