"""Publishing: a run's model in the formats that other tools take, and on the Hub."""
