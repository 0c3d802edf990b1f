"""Sinks for metrics: all receive the same records, and each does one thing with them."""
