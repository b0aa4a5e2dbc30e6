"""Outrider's server: events in over gRPC, matched, made durable, delivered, recorded."""

__version__ = "0.1.0"
