-- Every node, whether its lease holds, and how long. Locks: none.
SELECT name, address, draining, expires_at >= now() AS live, started_at,
    extract(epoch FROM expires_at - now())::float8 AS seconds
FROM node ORDER BY name
