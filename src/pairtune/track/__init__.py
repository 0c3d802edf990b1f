"""Sinks for metrics: each gets the same records, and each does one thing with them."""
