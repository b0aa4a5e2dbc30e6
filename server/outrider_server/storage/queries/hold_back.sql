-- Whatever these shards owe waits for a person: the due time that never comes. Locks: the shards' rows, held by the caller,
-- then owed rows.
WITH counted AS (
    UPDATE shard SET crashes = 0 WHERE shard = ANY($1::smallint[])
)
UPDATE owed SET due_us = $2 WHERE shard = ANY($1::smallint[])
