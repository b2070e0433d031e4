"""Files to rows, and rows to token ids."""
