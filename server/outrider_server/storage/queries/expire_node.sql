-- Whoever started this process saw it end: nobody needs to wait for its lease.
UPDATE node SET expires_at = '-infinity' WHERE name = $1 AND boot = $2
