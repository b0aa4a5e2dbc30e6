-- Delete a tenant softly: its row and name stay taken. Locks: the tenant, which lock_tenant holds already.
UPDATE tenant SET version = version + 1, updated_at = now(), deleted_at = now() WHERE id = $1
