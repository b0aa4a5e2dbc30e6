-- Events by tenant and sequence, in order, as many as fit into $3 bytes of payload (one at least).
SELECT tenant, sequence, type, time_us, source, subject, key, organization, actor, attributes, config_version, data
FROM (
    SELECT *, sum(octet_length(data)) OVER (ORDER BY sequence) - octet_length(data) AS before
    FROM event
    WHERE tenant = $1 AND sequence = ANY($2::bigint[])
) AS sized
WHERE before < $3
ORDER BY sequence
