-- Find the tenants of endpoints one of whose secrets ended between two times (microseconds since 1970): what a node
-- holds of them still signs with it. Locks: none.
SELECT DISTINCT tenant FROM endpoint
WHERE deleted_at IS NULL AND EXISTS (
    SELECT FROM jsonb_array_elements_text(settings -> 'secret_ends_us') AS ends (at)
    WHERE ends.at::bigint > $1 AND ends.at::bigint <= $2
)
