"""Models loaded, adapted and saved."""
