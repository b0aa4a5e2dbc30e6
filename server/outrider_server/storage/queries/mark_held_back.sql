-- Note that something of these shards waits for a person.
UPDATE shard SET held_back = true WHERE shard = ANY($1::smallint[])
