-- Make an event type; no row where it exists. Locks: the event type, under its tenant's lock.
INSERT INTO event_type (tenant, name, description, schema_json, sample_json, owning_module)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (tenant, name) DO NOTHING
RETURNING tenant, name, version, description, schema_json, sample_json, owning_module, created_at, updated_at
