-- Become the node of this name. A row of an earlier boot is overwritten: its shards are taken over with a higher epoch, so
-- it can write no more. With $5, who was this node before: no row where another boot has taken its place since.
INSERT INTO node (name, boot, address, expires_at)
VALUES ($1, $2, $4, now() + make_interval(secs => $3))
ON CONFLICT (name) DO UPDATE SET boot = EXCLUDED.boot, address = EXCLUDED.address, draining = false,
    started_at = CASE WHEN node.boot = EXCLUDED.boot THEN node.started_at ELSE now() END,
    expires_at = EXCLUDED.expires_at
WHERE node.boot = EXCLUDED.boot OR NOT $5
RETURNING name
