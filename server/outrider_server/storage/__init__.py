"""The only room that speaks Postgres: its tables, their verbs, and the way to them."""
