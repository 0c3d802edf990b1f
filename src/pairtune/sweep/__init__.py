"""The sweep: all trials of a grid, and the choice between them."""
