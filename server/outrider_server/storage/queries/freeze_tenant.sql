-- Take nothing in for a tenant, or take it in again. Locks: the tenant, which lock_tenant holds already.
UPDATE tenant SET frozen = $2 WHERE id = $1
