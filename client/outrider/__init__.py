"""Outrider's client: publish events durably, verify webhooks."""
