-- The endpoints to configure, of these tenants. Locks: none.
SELECT id, tenant, name, version, state, settings, sealed
FROM endpoint WHERE deleted_at IS NULL AND tenant = ANY($1::integer[]) ORDER BY tenant, id
