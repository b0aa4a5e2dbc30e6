-- Take shards over: from here on every write of the old owner is refused. The caller holds the leases of their holders
-- and the exclusive advisory lock of each shard (taken in shard order), so no transaction of the old owner is under way.
-- Whether they are free is asked again: another node may have been quicker, or the holder came back.
-- $3: this node's own last tenure ended for a reason that is nobody's fault. $4: seconds within which an owner that did not
-- release a shard counts as crashed over it.
UPDATE shard SET epoch = epoch + 1, node = $2, released = false, taken_at = now(),
    crashes = CASE
        WHEN released OR ($3 AND node = $2) THEN 0
        WHEN taken_at > now() - make_interval(secs => $4) THEN crashes + 1
        ELSE 1
    END
WHERE shard = ANY($1::smallint[])
    AND (node IS NULL OR node = $2
        OR NOT EXISTS (SELECT FROM node AS holder WHERE holder.name = shard.node AND holder.expires_at >= now()))
RETURNING shard, epoch, checkpoint, record_no, crashes
