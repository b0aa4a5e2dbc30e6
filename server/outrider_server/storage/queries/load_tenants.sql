-- The tenants to configure: all, or the one of id $1. Locks: none; read with the other load_ statements in one snapshot.
SELECT id, name, shard, display_name, strict_types, config_version, now() AS now
FROM tenant WHERE deleted_at IS NULL AND ($1::integer IS NULL OR id = $1) ORDER BY id
