-- The shards of which something waits for a person: all, or the one given. Also those whose owner ended before it could say
-- so. Locks: none.
SELECT shard FROM shard
WHERE ($1::integer IS NULL OR shard = $1)
    AND (held_back OR EXISTS (SELECT FROM owed WHERE owed.shard = shard.shard AND owed.due_us = $2))
ORDER BY shard
