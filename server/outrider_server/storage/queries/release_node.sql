-- A clean end: the lease ends now, so that a successor need not wait.
UPDATE node SET expires_at = now() WHERE name = $1 AND boot = $2
