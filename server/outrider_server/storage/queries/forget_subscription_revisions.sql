-- Revisions that a later one replaced before $1: no stored event was matched under them.
DELETE FROM subscription_revision AS old USING subscription_revision AS new
WHERE new.subscription = old.subscription AND new.version = old.version + 1 AND new.at < $1
