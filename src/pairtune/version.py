"""The version, in a module of its own so that it can be read without the interface for notebooks."""

__version__ = "0.1.0"
