-- How many deliveries of a tenant wait for nothing but their turn: events above the checkpoints of its shards, and owed rows
-- of active subscriptions that are due. Under the exclusive locks of its shards nothing is added. Locks: none.
SELECT (
    SELECT count(*) FROM shard CROSS JOIN LATERAL (
        SELECT FROM event
        WHERE event.tenant = $1 AND event.shard = shard.shard AND event.sequence > shard.checkpoint OFFSET 0
    ) AS event
    WHERE shard.shard = ANY($2::smallint[])
) + (
    SELECT coalesce(sum(cardinality(owed.sequences)), 0)
    FROM owed JOIN subscription ON subscription.id = owed.subscription AND subscription.state = 1
        JOIN endpoint ON endpoint.id = subscription.endpoint AND endpoint.state = 1
    WHERE owed.tenant = $1 AND owed.due_us = 0
)
