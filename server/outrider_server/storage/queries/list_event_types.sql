-- Read a page of a tenant's event types behind a name. Locks: none.
SELECT tenant, name, version, description, schema_json, sample_json, owning_module, created_at, updated_at
FROM event_type WHERE tenant = $1 AND name > $2 ORDER BY name LIMIT $3
