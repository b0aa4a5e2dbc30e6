-- The shards that a node holds, and under which epochs. Locks: none.
SELECT shard, epoch FROM shard WHERE node = $1 AND NOT released
