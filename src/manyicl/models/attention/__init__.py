"""Attention of each segment of a row to itself and to a shared prefix."""
