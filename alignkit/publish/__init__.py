"""Export models from this machine: model cards, the Hub, and files for other tools."""
