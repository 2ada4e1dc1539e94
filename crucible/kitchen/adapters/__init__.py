"""Adapters, one per outside world. Each imports what it needs only when it is used."""
