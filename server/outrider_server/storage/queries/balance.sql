-- Per tenant, in one snapshot: what matched and what became of it. matched counts events up to the checkpoint; `targets`
-- those above it; `window_named` what is already settled or owed of them.
WITH sums AS (
    SELECT t.tenant, sum(t.matched) AS matched, sum(t.delivered) AS delivered, sum(t.dead) AS dead,
        sum(t.cancelled) AS cancelled
    FROM ledger, unnest(tenants, ledger.matched, ledger.delivered, ledger.dead, ledger.cancelled)
        AS t (tenant, matched, delivered, dead, cancelled)
    GROUP BY t.tenant
    UNION ALL
    SELECT tenant, matched, delivered, dead, cancelled FROM ledger_sum
), totals AS (
    SELECT tenant, sum(matched)::bigint AS matched, sum(delivered)::bigint AS delivered, sum(dead)::bigint AS dead,
        sum(cancelled)::bigint AS cancelled
    FROM sums GROUP BY tenant
), owing AS (
    SELECT tenant, sum(cardinality(sequences))::bigint AS owed FROM owed GROUP BY tenant
), open AS (
    SELECT event.tenant, event.sequence, target.subscription
    FROM tenant CROSS JOIN LATERAL unnest(tenant.shards || tenant.former_shards) AS home (shard)
        JOIN shard ON shard.shard = home.shard
        -- OFFSET 0 keeps the planner from reading every event: the window is found by the primary key.
        CROSS JOIN LATERAL (
            SELECT * FROM event WHERE event.tenant = tenant.id AND event.shard = shard.shard AND event.sequence > shard.checkpoint OFFSET 0
        ) AS event,
        unnest(event.targets) AS target (subscription)
), window_open AS (
    SELECT open.tenant, count(*) AS targets,
        count(*) FILTER (WHERE NOT EXISTS (
            SELECT 1 FROM attempt WHERE attempt.tenant = open.tenant AND attempt.at >= open.sequence
                AND attempt.verdict = 1
                AND EXISTS (SELECT 1 FROM unnest(attempt.sequences, attempt.subscriptions) AS n (sequence, subscription)
                    WHERE n.sequence = open.sequence AND n.subscription = open.subscription)
        ) AND NOT EXISTS (
            SELECT 1 FROM dead_letter AS d WHERE d.subscription = open.subscription AND d.at >= open.sequence
                AND open.sequence = ANY(d.sequences)
        ) AND NOT EXISTS (
            SELECT 1 FROM owed WHERE owed.subscription = open.subscription AND open.sequence = ANY(owed.sequences)
        )) AS open
    FROM open GROUP BY open.tenant
)
SELECT tenant.name AS tenant, coalesce(totals.matched, 0) + coalesce(window_open.targets, 0) AS matched,
    coalesce(totals.delivered, 0) AS delivered, coalesce(totals.dead, 0) AS dead,
    coalesce(totals.cancelled, 0) AS cancelled, coalesce(owing.owed, 0) AS owed, coalesce(window_open.open, 0) AS "window"
FROM tenant LEFT JOIN totals ON totals.tenant = tenant.id LEFT JOIN owing ON owing.tenant = tenant.id
    LEFT JOIN window_open ON window_open.tenant = tenant.id
ORDER BY tenant.name
