"""Sealing: signing secrets, and URLs and headers that hold credentials, as they lie in the database."""
