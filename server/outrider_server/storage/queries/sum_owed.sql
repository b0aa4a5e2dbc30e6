-- How many deliveries these shards' owed rows stand for, and how many of them wait for a person.
SELECT coalesce(sum(cardinality(sequences)), 0)::bigint AS owed,
    coalesce(sum(cardinality(sequences)) FILTER (WHERE due_us = $2), 0)::bigint AS held_back
FROM owed WHERE shard = ANY($1::smallint[])
