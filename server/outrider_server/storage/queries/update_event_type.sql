-- Change an event type. Locks: the event type, under its tenant's lock.
UPDATE event_type SET version = version + 1, description = $3, schema_json = $4, sample_json = $5, owning_module = $6,
    updated_at = now()
WHERE tenant = $1 AND name = $2
RETURNING tenant, name, version, description, schema_json, sample_json, owning_module, created_at, updated_at
