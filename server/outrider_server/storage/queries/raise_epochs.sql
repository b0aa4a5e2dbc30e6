-- Make whoever owns these shards take them anew. Under their exclusive advisory locks.
UPDATE shard SET epoch = epoch + 1, released = true WHERE shard = ANY($1::smallint[])
