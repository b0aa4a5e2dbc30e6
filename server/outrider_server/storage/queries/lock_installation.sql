-- Serialise changes of what no tenant's lock covers: two tenants made at once must not choose the same least used shard,
-- nor two system keys pass their limit.
-- Locks: one advisory lock until the transaction ends, taken before any row.
SELECT pg_advisory_xact_lock(1329941317, 1)
