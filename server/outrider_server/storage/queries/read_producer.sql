-- A producer's latest session, and the highest frame of it that is durable.
SELECT session, max(last_frame) AS last_frame
FROM producer
WHERE producer = $1
GROUP BY session
ORDER BY session DESC
LIMIT 1
