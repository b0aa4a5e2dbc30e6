"""Measures the service from outside: its own process, its own database, real publishers, receivers that check everything."""

import os

# Before gRPC is loaded: its fork handlers would warn of each process that is started, and all of ours are executed at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
