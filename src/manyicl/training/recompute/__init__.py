"""Which layers run again in the backward pass, what they keep until then, and where."""
