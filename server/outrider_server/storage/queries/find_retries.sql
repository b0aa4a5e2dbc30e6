-- Owed rows whose time has come, in order of it; those the caller holds already are left out.
SELECT shard, id, tenant, subscription, first_sequence, sequences, attempt, due_us
FROM owed
WHERE subscription = ANY($1::integer[]) AND due_us > 0 AND due_us <= $4 AND shard = $5 AND id <> ALL($2::bigint[])
ORDER BY due_us
LIMIT $3
