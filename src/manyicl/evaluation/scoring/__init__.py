"""Scores of answers: was one right, and what did the model make of it."""
