"""Serving: loaded models that people talk to. Today in the terminal."""
