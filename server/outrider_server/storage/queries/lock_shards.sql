-- Wait for every transaction of the old owner that holds its fence; in shard order, like fence().
SELECT pg_advisory_xact_lock(1329941316, s) FROM (SELECT unnest($1::integer[]) AS s ORDER BY 1) AS ordered
