-- What is durable of a producer, per shard: its latest session there, and the last frame of that.
SELECT shard, session, last_frame FROM producer WHERE producer = $1
