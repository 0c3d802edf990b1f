"""Data: from a source's name to typed preference pairs, with every row accounted for."""
