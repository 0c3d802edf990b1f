"""The sweep: all trials of a grid, and the choice of the best one."""
