"""People's votes on answers: what they come to, which match tells most next, and pairs to train on.

Neither Django nor torch is imported here: the site keeps the votes, and this package computes with them.
"""
