-- Take shards over: from here on every write of the old owner is refused. The caller holds the exclusive advisory lock of
-- each shard (taken in shard order), so no transaction of the old owner is under way.
UPDATE shard SET epoch = epoch + 1, node = $2
WHERE shard = ANY($1::smallint[])
RETURNING shard, epoch, checkpoint, record_no
