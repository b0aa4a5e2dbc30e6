-- Spread a tenant's events over other shards from now on. Locks: the tenant, which lock_tenant holds already.
UPDATE tenant SET shards = $2, frozen = false, spread_at = now(), version = version + 1, updated_at = now(),
    former_shards = ARRAY(
        SELECT DISTINCT former FROM unnest(shards || former_shards) AS was (former) WHERE former <> ALL($2::smallint[]) ORDER BY 1
    )
WHERE id = $1
RETURNING id, name, shard, shards, former_shards, frozen, display_name, strict_types, config_version, version, created_at,
    updated_at
