-- Compare-and-set of the record number, and the checkpoint with it. Fewer rows than given: this node's memory is not the
-- log's any more.
UPDATE shard SET record_no = new.record_no, checkpoint = new.checkpoint
FROM unnest($1::smallint[], $2::bigint[], $3::bigint[], $4::bigint[]) AS new (shard, epoch, record_no, checkpoint)
WHERE shard.shard = new.shard AND shard.epoch = new.epoch AND shard.record_no = new.record_no - 1
RETURNING 1
