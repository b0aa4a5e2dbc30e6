-- Renew this node's lease. No row: another boot of the same node took its place.
UPDATE node SET expires_at = now() + make_interval(secs => $3), address = $4, draining = $5
WHERE name = $1 AND boot = $2
RETURNING expires_at
