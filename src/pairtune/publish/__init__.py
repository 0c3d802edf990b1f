"""Publishing: a run's model in formats that other tools load, and on the Hub."""
