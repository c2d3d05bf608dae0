"""How a query gets its answer after a prefix: a known answer is chosen, or one is generated."""
