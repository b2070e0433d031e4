"""What a model says: responses sampled, and responses read."""
