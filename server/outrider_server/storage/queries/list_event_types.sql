-- Read a page of a tenant's event types behind a name. Schemas and samples may be large: what comes ends with the row that
-- goes beyond $4 bytes. Locks: none.
SELECT tenant, name, version, description, schema_json, sample_json, owning_module, created_at, updated_at
FROM (
    SELECT page.*, sum(bytes) OVER (ORDER BY name) - bytes AS bytes_before
    FROM (
        SELECT *, octet_length(description) + octet_length(schema_json) + octet_length(sample_json) AS bytes
        FROM event_type WHERE tenant = $1 AND name > $2 ORDER BY name LIMIT $3
    ) AS page
) AS counted
WHERE bytes_before <= $4 ORDER BY name
