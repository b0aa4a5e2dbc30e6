-- Read an event type. Locks: none; a change reads it under its tenant's lock.
SELECT tenant, name, version, description, schema_json, sample_json, owning_module, created_at, updated_at
FROM event_type WHERE tenant = $1 AND name = $2
