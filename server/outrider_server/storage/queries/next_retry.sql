-- When the first retry that the caller does not hold is due.
SELECT min(due_us) FROM owed
WHERE subscription = ANY($1::integer[]) AND due_us > 0 AND shard = $3 AND id <> ALL($2::bigint[])
