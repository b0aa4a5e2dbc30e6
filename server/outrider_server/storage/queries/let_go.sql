-- What shards held back is due at once. The caller raises their epochs, so that whoever owns them reads it anew.
WITH marked AS (
    UPDATE shard SET held_back = false, crashes = 0 WHERE shard = ANY($1::smallint[])
)
UPDATE owed SET due_us = 0 WHERE shard = ANY($1::smallint[]) AND due_us = $2
