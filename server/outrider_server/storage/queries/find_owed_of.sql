-- Owed rows of a subscription in a shard, whatever they wait for.
SELECT shard, id, tenant, subscription, first_sequence, sequences, attempt, due_us
FROM owed
WHERE subscription = $1 AND shard = $3
LIMIT $2
