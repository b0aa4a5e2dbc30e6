-- Owed rows that wait for room, in sequence order; those the caller holds already are left out.
SELECT shard, id, tenant, subscription, first_sequence, sequences, attempt, due_us
FROM owed
WHERE subscription = ANY($1::integer[]) AND due_us = 0 AND shard = $4 AND id <> ALL($2::bigint[])
ORDER BY first_sequence
LIMIT $3
