-- Spread a tenant's events over other shards from now on; no row where it is not frozen any more. Locks: the tenant, which lock_tenant holds already.
UPDATE tenant SET shards = $2, frozen_until = NULL, spread_at = now(), version = version + 1, updated_at = now(),
    former_shards = ARRAY(
        SELECT DISTINCT former FROM unnest(shards || former_shards) AS was (former) WHERE former <> ALL($2::smallint[]) ORDER BY 1
    )
WHERE id = $1 AND frozen_until > clock_timestamp()
RETURNING id, name, shard, shards, former_shards, frozen_until, display_name, strict_types, config_version, version, created_at,
    updated_at
