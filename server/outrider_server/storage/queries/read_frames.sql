-- What frames of a session were answered with.
SELECT number, ack FROM producer_frame WHERE producer = $1 AND session = $2 AND number = ANY($3::bigint[])
