-- Take nothing in for a tenant for so many seconds; 0: take it in again. Locks: the tenant, which lock_tenant holds already.
UPDATE tenant SET frozen_until = CASE WHEN $2 > 0 THEN clock_timestamp() + make_interval(secs => $2) END WHERE id = $1
