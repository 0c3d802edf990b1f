"""Models: from a name to weights in memory, adapters on top of them, answers out of them."""
