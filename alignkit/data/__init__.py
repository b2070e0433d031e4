"""Convert files to rows, and rows to token ids."""
