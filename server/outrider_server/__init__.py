"""Outrider's server."""
