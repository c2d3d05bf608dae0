"""The tables that commands print: what will be done, what was found, and what a run ended with."""
