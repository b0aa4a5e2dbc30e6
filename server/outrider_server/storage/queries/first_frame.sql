-- The first frame of a session whose answer is kept, and when it was given.
SELECT number, at FROM producer_frame WHERE producer = $1 AND session = $2 ORDER BY number LIMIT 1
