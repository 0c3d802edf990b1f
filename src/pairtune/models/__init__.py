"""Models: finding and loading weights and adapters, generating answers, saving."""
