-- A clean end: nobody needs to wait for the lease. Nodes that are long gone are forgotten.
WITH forgotten AS (
    DELETE FROM node WHERE expires_at < now() - interval '1 day'
        AND NOT EXISTS (SELECT FROM shard WHERE shard.node = node.name)
)
UPDATE node SET expires_at = '-infinity', draining = true WHERE name = $1 AND boot = $2
