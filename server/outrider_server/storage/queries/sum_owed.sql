-- How many deliveries these shards' owed rows stand for.
SELECT coalesce(sum(cardinality(sequences)), 0)::bigint FROM owed WHERE shard = ANY($1::smallint[])
