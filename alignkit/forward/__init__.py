"""Forward passes of models: sample responses, and read existing ones."""
