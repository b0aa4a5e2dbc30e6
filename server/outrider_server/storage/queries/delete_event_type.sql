-- Delete an event type: events carry their type as text, so nothing refers to the row.
-- Locks: the event type, under its tenant's lock.
DELETE FROM event_type WHERE tenant = $1 AND name = $2
