-- Which of these keys name an event already, stored since $3.
SELECT tenant, key, sequence
FROM unnest($1::integer[], $2::uuid[]) AS wanted (tenant, key)
JOIN idempotency USING (tenant, key)
WHERE sequence >= $3
