-- Every tenant that ever was, with its shard. Locks: none.
SELECT id, shard FROM tenant
