-- The events of a shard above a sequence, by its tenants: the primary key finds them, other shards are not read.
SELECT sequence, tenant, targets
FROM event
WHERE tenant = ANY($1::integer[]) AND sequence > $2 AND shard = $3
ORDER BY sequence
