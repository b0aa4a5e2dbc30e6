-- Owed rows of these shards that name an event below $2: what retention ends.
SELECT shard, id, tenant, subscription, first_sequence, sequences, attempt, due_us
FROM owed
WHERE shard = ANY($1::smallint[]) AND first_sequence < $2
LIMIT $3
