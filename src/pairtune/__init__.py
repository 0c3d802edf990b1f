"""Pairtune: tune a small language model to people's preferences, on the machine you have."""

__version__ = "0.1.0"
