"""Measures the service from outside: its own process, its own database, real publishers, receivers that check everything."""
