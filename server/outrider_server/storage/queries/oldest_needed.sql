-- The first sequence that any owed row names (the largest there is, where none does); 0 while a shard has no live owner.
SELECT CASE
    WHEN EXISTS (
        SELECT FROM shard LEFT JOIN node ON node.name = shard.node
        WHERE node.name IS NULL OR node.expires_at < now()
    ) THEN 0
    ELSE coalesce((SELECT min(first_sequence) FROM owed), 9223372036854775807)
END
