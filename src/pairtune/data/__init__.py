"""Data: from the name of a source to typed preference pairs, with every row accounted for."""
