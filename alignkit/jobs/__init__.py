"""The command line, and notebooks as jobs."""
