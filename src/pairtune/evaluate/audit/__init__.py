"""The audit: rules that find in a run's own numbers what is wrong with it. No model is loaded."""
