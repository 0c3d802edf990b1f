"""Serving: models in memory, for the terminal chat and for the worker behind OpenAI's API."""
