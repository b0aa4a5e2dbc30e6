-- Count a tenant's event types, for its limit. Locks: none of its own; under its tenant's lock the number is exact.
SELECT count(*) FROM event_type WHERE tenant = $1
