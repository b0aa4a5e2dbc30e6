-- The shards of which something waits for a person: all, or the one given. Locks: none.
SELECT shard FROM shard WHERE held_back AND ($1::integer IS NULL OR shard = $1) ORDER BY shard
