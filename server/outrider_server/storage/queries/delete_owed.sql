-- All deliveries of these rows are settled.
DELETE FROM owed USING unnest($1::smallint[], $2::bigint[]) AS done (shard, id)
WHERE owed.shard = done.shard AND owed.id = done.id
