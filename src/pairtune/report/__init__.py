"""Reports: pure functions of a run folder."""
