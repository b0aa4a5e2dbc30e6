-- What attempts, dead letters and owed rows name of a shard's events from $2 on: (sequence, subscription) pairs.
-- An attempt's `at` is never below the sequences it names.
SELECT sequence, subscription
FROM attempt, unnest(sequences, subscriptions) AS named (sequence, subscription)
WHERE shard = $1 AND at >= $2 AND sequence >= $2 AND verdict = 1
UNION
SELECT sequence, subscription FROM dead_letter, unnest(sequences) AS named (sequence)
WHERE shard = $1 AND at >= $2 AND sequence >= $2
UNION
SELECT sequence, subscription FROM owed, unnest(sequences) AS named (sequence)
WHERE shard = $1 AND sequence >= $2
