"""Evaluation: what a model does on prompts and pairs that it was not trained on."""
