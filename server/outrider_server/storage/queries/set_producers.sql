-- Compare-and-set of producers' sessions and frames: a row that is not behind the new values is not touched, and the caller
-- sees fewer rows than it gave. Rows come sorted, so two callers cannot wait for each other.
INSERT INTO producer (producer, shard, session, last_frame)
SELECT * FROM unnest($1::text[], $2::smallint[], $3::bigint[], $4::bigint[])
ON CONFLICT (producer, shard) DO UPDATE
    SET session = EXCLUDED.session, last_frame = EXCLUDED.last_frame, updated_at = now()
    WHERE producer.session < EXCLUDED.session
        OR (producer.session = EXCLUDED.session AND producer.last_frame < EXCLUDED.last_frame)
RETURNING 1
