"""The desk world, the built-in default: small enough that all its quantities can be computed exactly."""
