-- What attempts, dead letters and owed rows name of a shard's events from $2 on, as they stand: sequences with their
-- subscriptions, or with the one subscription that all are of. An attempt's `at` is never below the sequences it names.
SELECT sequences, subscriptions, NULL::integer AS subscription
FROM attempt
WHERE shard = $1 AND at >= $2 AND verdict = 1
UNION ALL
SELECT sequences, NULL, subscription FROM dead_letter
WHERE shard = $1 AND at >= $2
UNION ALL
SELECT sequences, NULL, subscription FROM owed
WHERE shard = $1 AND sequences[cardinality(sequences)] >= $2
