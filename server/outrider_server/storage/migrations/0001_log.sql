-- The log and its configuration. ARCHITECTURE.md tells the invariant these tables keep.
--
-- Numbers used all over:
--   sequence  bigint: (microseconds since 1970 UTC << 10) + shard. The event's id, its place and its time at once.
--   at        bigint: the same clock, at the moment of a record; the key that history tables are partitioned by.
-- migrate:up

-- One row a node: its lease. A node may send only while its lease, by its own monotonic clock, holds.
CREATE TABLE node (
    name        text PRIMARY KEY,
    boot        uuid NOT NULL,
    address     text NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL
);

-- The 64 slices of the log. Takeover raises the epoch; every write of an owner checks it (see fence below).
-- checkpoint: every delivery of every event at or below it is settled or stands as an owed row.
CREATE TABLE shard (
    shard       smallint PRIMARY KEY CHECK (shard BETWEEN 0 AND 63),
    epoch       bigint NOT NULL DEFAULT 0,
    node        text,
    checkpoint  bigint NOT NULL DEFAULT 0,
    record_no   bigint NOT NULL DEFAULT 0,
    UNIQUE (shard, epoch)
) WITH (fillfactor = 50);
INSERT INTO shard (shard) SELECT generate_series(0, 63);

-- Every ingest and record transaction calls this first. The shared advisory lock makes takeover (which takes it
-- exclusively) wait for transactions under way; the epoch is read afterwards, with a snapshot of its own because the
-- function is volatile, so an old owner sees a takeover that committed while it waited. It writes nothing.
-- Locks are taken in shard order, so two callers cannot wait for each other.
CREATE FUNCTION fence(shards smallint[], epochs bigint[]) RETURNS void LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    held integer;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1329941316, s)
        FROM (SELECT unnest(shards) AS s ORDER BY 1) AS ordered;
    SELECT count(*) INTO held
        FROM shard JOIN unnest(shards, epochs) AS mine (s, e) ON shard.shard = mine.s AND shard.epoch = mine.e;
    IF held <> cardinality(shards) THEN
        RAISE EXCEPTION 'another node took a shard over' USING ERRCODE = 'OR001';
    END IF;
END $$;

CREATE TABLE tenant (
    id              integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name            text NOT NULL UNIQUE,
    shard           smallint NOT NULL REFERENCES shard,
    display_name    text NOT NULL DEFAULT '',
    strict_types    boolean NOT NULL DEFAULT false,
    -- Grows with every change of the tenant's endpoints, subscriptions or event types. An event's row names the
    -- version it was matched under.
    config_version  bigint NOT NULL DEFAULT 1,
    version         integer NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz
);

CREATE TABLE event_type (
    tenant          integer NOT NULL REFERENCES tenant,
    name            text NOT NULL,
    version         integer NOT NULL DEFAULT 1,
    description     text NOT NULL DEFAULT '',
    schema_json     text NOT NULL DEFAULT '',
    sample_json     text NOT NULL DEFAULT '',
    owning_module   text NOT NULL DEFAULT '',
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, name)
);

-- Ids of endpoints and subscriptions are never reused: deletion is soft, rows stay.
-- sealed: the URL, headers and signing secrets, as JSON, encrypted. settings: the rest, as JSON.
CREATE TABLE endpoint (
    id              integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant          integer NOT NULL REFERENCES tenant,
    name            text NOT NULL,
    version         integer NOT NULL DEFAULT 1,
    state           smallint NOT NULL DEFAULT 1,
    display_name    text NOT NULL DEFAULT '',
    settings        jsonb NOT NULL,
    sealed          bytea NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz
);
CREATE UNIQUE INDEX endpoint_name ON endpoint (tenant, name) WHERE deleted_at IS NULL;

CREATE TABLE subscription (
    id              integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant          integer NOT NULL REFERENCES tenant,
    name            text NOT NULL,
    endpoint        integer NOT NULL REFERENCES endpoint,
    version         integer NOT NULL DEFAULT 1,
    state           smallint NOT NULL DEFAULT 1,
    display_name    text NOT NULL DEFAULT '',
    types           text[] NOT NULL,
    filter          text NOT NULL DEFAULT '',
    filter_ast      bytea,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz
);
CREATE UNIQUE INDEX subscription_name ON subscription (tenant, name) WHERE deleted_at IS NULL;
CREATE INDEX subscription_endpoint ON subscription (endpoint);

-- Append-only history: what a subscription or endpoint was when an event was matched under config_version. Kept while
-- such an event is stored.
CREATE TABLE subscription_revision (
    subscription    integer NOT NULL REFERENCES subscription,
    version         integer NOT NULL,
    tenant          integer NOT NULL,
    config_version  bigint NOT NULL,
    state           smallint NOT NULL,
    types           text[] NOT NULL,
    filter          text NOT NULL,
    filter_ast      bytea,
    at              timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subscription, version)
);
CREATE TABLE endpoint_revision (
    endpoint        integer NOT NULL REFERENCES endpoint,
    version         integer NOT NULL,
    tenant          integer NOT NULL,
    config_version  bigint NOT NULL,
    state           smallint NOT NULL,
    settings        jsonb NOT NULL,
    sealed          bytea NOT NULL,
    at              timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (endpoint, version)
);

-- hash: SHA-256 of the key's text (256 random bits need no slow hash). tenant NULL: every tenant (system admin).
CREATE TABLE api_key (
    id              text PRIMARY KEY,
    tenant          integer REFERENCES tenant,
    role            smallint NOT NULL,
    hash            bytea NOT NULL UNIQUE,
    display_name    text NOT NULL DEFAULT '',
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz,
    revoked_at      timestamptz
);

-- Every event, also one that matched nothing. targets: the subscriptions it matched, ascending. over_budget: those
-- whose filter exceeded its budget (no match). Texts that the module left out are NULL.
CREATE TABLE event (
    tenant          integer NOT NULL,
    sequence        bigint NOT NULL,
    shard           smallint NOT NULL,
    type            text NOT NULL,
    time_us         bigint NOT NULL,
    source          text,
    subject         text,
    key             text,
    organization    text,
    actor           text,
    idempotency_key text,
    attributes      text,
    targets         integer[] NOT NULL,
    over_budget     integer[],
    config_version  bigint NOT NULL,
    data            bytea NOT NULL,
    PRIMARY KEY (tenant, sequence)
) PARTITION BY RANGE (sequence);
ALTER TABLE event ALTER COLUMN data SET STORAGE EXTERNAL;
CREATE INDEX event_sequence ON event USING brin (sequence);

-- Deliveries still owed, packed: up to 256 sequences of one subscription that share attempt number and due time.
-- A row changes only in the record that settles its deliveries. id = (record_no << 20) + place in the record, so it
-- is unique in its shard by the record's compare-and-set. due_us: not before this time; 0 is at once.
CREATE TABLE owed (
    shard           smallint NOT NULL,
    id              bigint NOT NULL,
    tenant          integer NOT NULL,
    subscription    integer NOT NULL,
    first_sequence  bigint NOT NULL,
    sequences       bigint[] NOT NULL CHECK (cardinality(sequences) BETWEEN 1 AND 256),
    attempt         integer NOT NULL,
    due_us          bigint NOT NULL,
    key_hash        integer,
    cause           smallint NOT NULL,
    PRIMARY KEY (shard, id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
-- What waits for room, in sequence order, and what waits for its time, in order of it.
CREATE INDEX owed_backlog ON owed (subscription, first_sequence) WHERE due_us = 0;
CREATE INDEX owed_retry ON owed (subscription, due_us) WHERE due_us > 0;

-- One row a request: deliveries (sequences[i], subscriptions[i]) and what came of them.
CREATE TABLE attempt (
    at              bigint NOT NULL,
    shard           smallint NOT NULL,
    tenant          integer NOT NULL,
    endpoint        integer NOT NULL,
    endpoint_version integer NOT NULL,
    sequences       bigint[] NOT NULL,
    subscriptions   integer[] NOT NULL,
    number          integer NOT NULL,
    verdict         smallint NOT NULL,
    status          smallint NOT NULL,
    error           smallint NOT NULL,
    duration_ms     real NOT NULL,
    detail          text,
    response        bytea
) PARTITION BY RANGE (at);
CREATE INDEX attempt_at ON attempt USING brin (at);
CREATE INDEX attempt_endpoint ON attempt (endpoint, at);

-- Deliveries that ended without success. verdict 3: dead (policy or retention ended); 4: cancelled.
CREATE TABLE dead_letter (
    at              bigint NOT NULL,
    shard           smallint NOT NULL,
    tenant          integer NOT NULL,
    endpoint        integer NOT NULL,
    subscription    integer NOT NULL,
    sequences       bigint[] NOT NULL,
    attempts        integer NOT NULL,
    verdict         smallint NOT NULL,
    reason          text NOT NULL,
    status          smallint NOT NULL,
    detail          text
) PARTITION BY RANGE (at);
CREATE INDEX dead_letter_subscription ON dead_letter (subscription, at);

-- One row a record and shard: what it settled, per tenant. matched counts the targets of the events that the
-- checkpoint passed in this record.
CREATE TABLE ledger (
    at              bigint NOT NULL,
    shard           smallint NOT NULL,
    record_no       bigint NOT NULL,
    tenants         integer[] NOT NULL,
    matched         bigint[] NOT NULL,
    delivered       bigint[] NOT NULL,
    dead            bigint[] NOT NULL,
    cancelled       bigint[] NOT NULL,
    PRIMARY KEY (shard, record_no, at)
) PARTITION BY RANGE (at);

-- Sums of ledger rows whose partitions were dropped, so that the balance stays exact for ever.
CREATE TABLE ledger_sum (
    tenant          integer PRIMARY KEY,
    matched         bigint NOT NULL,
    delivered       bigint NOT NULL,
    dead            bigint NOT NULL,
    cancelled       bigint NOT NULL
);

-- The last frame of a producer's session that is durable, per shard it touched: compared and set with the frame.
CREATE TABLE producer (
    producer        text NOT NULL,
    shard           smallint NOT NULL,
    session         bigint NOT NULL,
    last_frame      bigint NOT NULL,
    updated_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (producer, shard)
) WITH (fillfactor = 50);

-- What a frame was answered with, so that it can be answered again when it comes again. Kept for a day.
CREATE TABLE producer_frame (
    at              bigint NOT NULL,
    producer        text NOT NULL,
    session         bigint NOT NULL,
    number          bigint NOT NULL,
    ack             bytea NOT NULL
) PARTITION BY RANGE (at);
CREATE INDEX producer_frame_number ON producer_frame (producer, session, number);

-- Idempotency keys (the first 16 bytes of their BLAKE2b hash), kept for a day. A look-up probes every partition, hence
-- four-hour ones and no more than seven.
CREATE TABLE idempotency (
    tenant          integer NOT NULL,
    key             uuid NOT NULL,
    sequence        bigint NOT NULL,
    PRIMARY KEY (tenant, key, sequence)
) PARTITION BY RANGE (sequence);

-- migrate:down
DROP TABLE idempotency, producer_frame, producer, ledger_sum, ledger, dead_letter, attempt, owed, event, api_key,
    endpoint_revision, subscription_revision, subscription, endpoint, event_type, tenant, shard, node CASCADE;
DROP FUNCTION fence(smallint[], bigint[]);
