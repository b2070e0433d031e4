"""The desk world, the embedded default: small enough that everything about it is known."""
