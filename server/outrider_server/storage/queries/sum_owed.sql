-- How many deliveries owed rows stand for.
SELECT coalesce(sum(cardinality(sequences)), 0)::bigint FROM owed
