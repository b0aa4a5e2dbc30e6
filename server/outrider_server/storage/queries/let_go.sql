-- What a shard held back is due at once. The caller raised its epoch, so that whoever owns it reads it anew.
WITH marked AS (
    UPDATE shard SET held_back = false, crashes = 0 WHERE shard = $1
)
UPDATE owed SET due_us = 0 WHERE shard = $1 AND due_us = $2
