-- Count a tenant's endpoints, for its limit. Locks: none of its own; under its tenant's lock the number is exact.
SELECT count(*) FROM endpoint WHERE tenant = $1 AND deleted_at IS NULL
