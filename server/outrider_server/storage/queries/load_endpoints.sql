-- The endpoints to configure, of all tenants or of one. Locks: none.
SELECT id, tenant, name, version, state, settings, sealed
FROM endpoint WHERE deleted_at IS NULL AND ($1::integer IS NULL OR tenant = $1) ORDER BY tenant, id
