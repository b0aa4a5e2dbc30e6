-- Whether there is anything that needs a sealing key: an endpoint that is not deleted. Locks: none.
SELECT EXISTS (SELECT FROM endpoint WHERE deleted_at IS NULL)
