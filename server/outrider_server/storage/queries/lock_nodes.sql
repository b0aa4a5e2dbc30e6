-- Hold the leases of these nodes still: a renewal under way ends first, a later one waits and then sees what was taken.
-- Locks: the nodes, by name, before any shard.
SELECT name FROM node WHERE name = ANY($1::text[]) ORDER BY name FOR UPDATE
