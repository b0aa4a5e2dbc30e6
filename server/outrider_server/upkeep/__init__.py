"""Loops beside the path of an event.

lease.py   the node's lease: renewed, and trusted only until a deadline of the local clock
prune.py   partitions made ahead and dropped after retention
jobs.py    owed rows of deleted subscriptions, cancelled page by page
disk.py    free disk watched: under its floor publishes are refused
"""
