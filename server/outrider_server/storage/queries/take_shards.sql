-- Take shards over: from here on every write of the old owner is refused. The caller holds the exclusive advisory lock of
-- each shard (taken in shard order), so no transaction of the old owner is under way. Whether they are free is asked again:
-- another node may have been quicker.
UPDATE shard SET epoch = epoch + 1, node = $2
WHERE shard = ANY($1::smallint[])
    AND (node IS NULL OR node = $2
        OR NOT EXISTS (SELECT FROM node AS holder WHERE holder.name = shard.node AND holder.expires_at >= now()))
RETURNING shard, epoch, checkpoint, record_no
