"""Spikes: small programs that measure one question each before the design is built on its answer. README.md has the answers."""
