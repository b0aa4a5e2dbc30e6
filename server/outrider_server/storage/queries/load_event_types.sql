-- The names of the event types to configure, of these tenants. Locks: none.
SELECT tenant, name FROM event_type WHERE tenant = ANY($1::integer[])
