"""How does a model leave this machine? Model cards, the Hub, and files from which other tools start."""
