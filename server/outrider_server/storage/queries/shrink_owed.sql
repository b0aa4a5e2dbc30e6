-- Some of a row's deliveries are settled; the rest stays owed.
UPDATE owed SET sequences = $3, first_sequence = $4 WHERE shard = $1 AND id = $2
