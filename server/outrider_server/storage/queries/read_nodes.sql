-- Every node, whether its lease holds, and how long. Locks: none.
SELECT name, address, draining, expires_at >= now() AS live, started_at,
    CASE WHEN isfinite(expires_at) THEN extract(epoch FROM expires_at - now())::float8 ELSE 0 END AS seconds
FROM node ORDER BY name
