-- Give shards up in order, to the node named (NULL: to nobody). No row where this node does not hold it any more.
UPDATE shard SET node = mine.target, released = true
FROM unnest($1::smallint[], $2::bigint[], $3::text[]) AS mine (shard, epoch, target)
WHERE shard.shard = mine.shard AND shard.epoch = mine.epoch AND shard.node = $4
RETURNING shard.shard
