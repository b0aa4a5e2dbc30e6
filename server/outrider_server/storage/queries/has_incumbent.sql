-- Whether an earlier boot of this node's name still runs: its lease has not ended, and it has connections. Those of a
-- process that was killed end with it, its lease only later. Locks: none.
SELECT EXISTS (
    SELECT FROM node JOIN pg_stat_activity AS backend
        ON split_part(backend.application_name, '/', 1) = 'outrider'
        AND split_part(backend.application_name, '/', 2) = node.name
        AND split_part(backend.application_name, '/', 3) = left(replace(node.boot::text, '-', ''), $3)
    WHERE node.name = $1 AND node.boot <> $2 AND node.expires_at > now() AND backend.datname = current_database()
)
