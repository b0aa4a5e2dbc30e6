-- Revisions that a later one replaced before $1: no stored event was sent under them.
DELETE FROM endpoint_revision AS old USING endpoint_revision AS new
WHERE new.endpoint = old.endpoint AND new.version = old.version + 1 AND new.at < $1
