-- The subscriptions to configure, of these tenants. Locks: none.
SELECT id, tenant, name, endpoint, version, state, types, filter, filter_ast
FROM subscription WHERE deleted_at IS NULL AND tenant = ANY($1::integer[]) ORDER BY tenant, id
