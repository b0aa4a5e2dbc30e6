-- End what earlier owners of these names still have open, so that takeover need not wait for their transactions.
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND split_part(application_name, '/', 1) = 'outrider' AND split_part(application_name, '/', 2) = ANY($1::text[])
    AND split_part(application_name, '/', 3) <> $2
