-- Hold a tenant's row until the transaction ends without changing its configuration's version: API keys are no part of
-- what events are matched under. Locks: the tenant, before its keys.
SELECT id FROM tenant WHERE id = $1 AND deleted_at IS NULL FOR NO KEY UPDATE
