"""The command, and notebooks as jobs."""
