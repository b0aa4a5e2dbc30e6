-- The subscriptions to configure, of all tenants or of one. Locks: none.
SELECT id, tenant, name, endpoint, version, state, types, filter, filter_ast
FROM subscription WHERE deleted_at IS NULL AND ($1::integer IS NULL OR tenant = $1) ORDER BY tenant, id
