-- Every tenant that ever was in one of these shards: one row a tenant and shard, also of deleted ones. Locks: none.
SELECT tenant.id, home.shard
FROM tenant, unnest(tenant.shards || tenant.former_shards) AS home (shard)
WHERE home.shard = ANY($1::smallint[])
