-- Owed rows of a subscription, whatever they wait for.
SELECT shard, id, tenant, subscription, first_sequence, sequences, attempt, due_us
FROM owed
WHERE subscription = $1
LIMIT $2
