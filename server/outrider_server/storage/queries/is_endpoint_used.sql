-- Whether a subscription uses an endpoint. Locks: none of its own; under the tenant's lock the answer holds.
SELECT EXISTS (SELECT FROM subscription WHERE endpoint = $1 AND deleted_at IS NULL)
