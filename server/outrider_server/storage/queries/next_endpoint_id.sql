-- Take the id of an endpoint to be: its secrets are sealed for that id, so it must be known before the row is.
SELECT nextval(pg_get_serial_sequence('endpoint', 'id'))::integer
