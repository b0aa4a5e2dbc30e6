-- End what these nodes still have open, so that a takeover need not wait for their transactions: of those whose lease is
-- over, and of earlier boots of this node ($2, its boot's mark $3).
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND split_part(application_name, '/', 1) = 'outrider'
    AND (
        (split_part(application_name, '/', 2) = $2 AND split_part(application_name, '/', 3) <> $3)
        OR (
            split_part(application_name, '/', 2) <> $2
            AND split_part(application_name, '/', 2) IN (SELECT name FROM node WHERE name = ANY($1::text[]) AND expires_at < now())
        )
    )
