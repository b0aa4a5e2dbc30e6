-- Homes: shards that move between nodes, tenants split over several, and shards whose owners keep crashing.
-- migrate:up

-- A node that drains is given no shards, and counts for nobody's fair share.
ALTER TABLE node ADD COLUMN draining boolean NOT NULL DEFAULT false;

-- released: the last owner gave the shard up in order. crashes: how many owners in a row did not, each soon after
-- taken_at, when it was taken. held_back: it came up with what it owes waiting for a person.
ALTER TABLE shard
    ADD COLUMN released boolean NOT NULL DEFAULT true,
    ADD COLUMN crashes smallint NOT NULL DEFAULT 0,
    ADD COLUMN taken_at timestamptz,
    ADD COLUMN held_back boolean NOT NULL DEFAULT false;

-- The shards that a tenant's events are spread over by their keys, its home first; and those that they were in before.
-- frozen_until: nothing is taken in before it, while they change. spread_at: when they last changed.
ALTER TABLE tenant
    ADD COLUMN shards smallint[],
    ADD COLUMN former_shards smallint[] NOT NULL DEFAULT '{}',
    ADD COLUMN frozen_until timestamptz,
    ADD COLUMN spread_at timestamptz;
UPDATE tenant SET shards = ARRAY[shard];
ALTER TABLE tenant
    ALTER COLUMN shards SET NOT NULL,
    ADD CHECK (cardinality(shards) BETWEEN 1 AND 64 AND shards[1] = shard AND NOT shards && former_shards);

-- A takeover reads what was attempted in the last seconds: without this it would read every page that no vacuum has seen.
DROP INDEX attempt_at;
CREATE INDEX attempt_at ON attempt USING brin (at) WITH (autosummarize = on);

-- migrate:down
DROP INDEX attempt_at;
CREATE INDEX attempt_at ON attempt USING brin (at);
ALTER TABLE tenant DROP COLUMN shards, DROP COLUMN former_shards, DROP COLUMN frozen_until, DROP COLUMN spread_at;
ALTER TABLE shard DROP COLUMN released, DROP COLUMN crashes, DROP COLUMN taken_at, DROP COLUMN held_back;
ALTER TABLE node DROP COLUMN draining;
