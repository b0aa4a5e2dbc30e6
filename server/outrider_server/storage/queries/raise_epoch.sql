-- Make whoever owns a shard take it anew. Under its exclusive advisory lock.
UPDATE shard SET epoch = epoch + 1, released = true WHERE shard = $1
