"""The audit: rules that find faults in a run from its own numbers. No model is loaded."""
