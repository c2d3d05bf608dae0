"""An embedded world of small English-like text, to show the method without a download."""
