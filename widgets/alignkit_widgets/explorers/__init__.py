"""One idea each, number by number."""
