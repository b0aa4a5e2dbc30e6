-- The names of the event types to configure, of all tenants or of one. Locks: none.
SELECT tenant, name FROM event_type WHERE $1::integer IS NULL OR tenant = $1
