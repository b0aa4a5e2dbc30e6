"""The path of an event.

ingest.py    check what a stream brings: sizes, texts, JSON; one parse serves matching
match.py     ask the tenant's current index which subscriptions want it
persist.py   events with their targets, in one transaction of many frames; then the producer is answered
             (policy.obligations: into the bounded lane of each endpoint, or owed)
deliver.py   a lane takes what its policies allow; sign, send one request, note the outcome
record.py    outcomes in numbered records: attempts, owed rows, ledger, checkpoint
catch_up.py  owed rows back into lanes: after restart, takeover, resume, overflow, for retries
tenure.py    one period of holding shards: takes them over, runs the stages above, forgets all when one fails
large.py     events too large to be parsed on the loop: checked and matched in a child process
"""
