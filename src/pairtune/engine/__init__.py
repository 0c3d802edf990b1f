"""The training engines: from pristine weights to per-example evaluations and the best epoch's weights on disk."""
