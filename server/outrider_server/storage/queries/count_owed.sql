-- Per shard and subscription: rows that wait for room, and when the first of those that wait for a time is due.
SELECT shard, subscription, min(tenant) AS tenant, count(*) FILTER (WHERE due_us = 0) AS backlog,
    min(due_us) FILTER (WHERE due_us > 0) AS retry_us
FROM owed
WHERE shard = ANY($1::smallint[])
GROUP BY shard, subscription
