"""Evaluation of models on prompts and pairs that they were not trained on."""
