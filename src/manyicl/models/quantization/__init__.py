"""Linear layers of a frozen base in fewer bits: 4 (bitsandbytes), or 8 that are multiplied as they are."""
