-- Per shard, in one snapshot: its owner and epoch, the events above its checkpoint, what it owes, and how long the oldest
-- delivery that waits for nothing but its turn has waited, in seconds. Locks: none.
WITH open AS (
    SELECT shard.shard, count(*) AS events, min(event.sequence) AS oldest
    FROM tenant CROSS JOIN LATERAL unnest(tenant.shards || tenant.former_shards) AS home (shard)
        JOIN shard ON shard.shard = home.shard
        CROSS JOIN LATERAL (
            SELECT sequence FROM event
            WHERE event.tenant = tenant.id AND event.shard = shard.shard AND event.sequence > shard.checkpoint OFFSET 0
        ) AS event
    GROUP BY shard.shard
), owing AS (
    SELECT shard, sum(cardinality(sequences))::bigint AS deliveries,
        coalesce(sum(cardinality(sequences)) FILTER (WHERE due_us = $1), 0)::bigint AS held_back,
        min(first_sequence) FILTER (WHERE due_us = 0) AS oldest
    FROM owed GROUP BY shard
)
SELECT shard.shard, shard.node, shard.epoch, shard.crashes, coalesce(open.events, 0) AS window,
    coalesce(owing.deliveries, 0) AS owed, coalesce(owing.held_back, 0) AS held_back,
    greatest(0, extract(epoch FROM clock_timestamp()) - (least(open.oldest, owing.oldest) >> 10) / 1e6)::float8 AS lag_seconds
FROM shard LEFT JOIN open USING (shard) LEFT JOIN owing USING (shard)
ORDER BY shard.shard
