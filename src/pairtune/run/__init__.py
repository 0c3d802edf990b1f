"""The run folder: its paths, the records in it and their format, and `Run`, through which all rooms read and write."""
