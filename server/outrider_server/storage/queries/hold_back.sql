-- What these shards owe at once or within a minute waits for a person: the due time that never comes. A later retry was not
-- what ended their owners; it keeps its time. Locks: the shards' rows, held by the caller, then owed rows.
WITH counted AS (
    UPDATE shard SET crashes = 0 WHERE shard = ANY($1::smallint[])
)
UPDATE owed SET due_us = $2
WHERE shard = ANY($1::smallint[])
    AND due_us <= (SELECT (extract(epoch FROM clock_timestamp() + interval '1 min') * 1000000)::bigint)
