"""The run folder: its paths, its records and their format, and `Run`, which all reading and writing goes through."""
