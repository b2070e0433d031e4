"""Explorers: one concept each, in numbers."""
