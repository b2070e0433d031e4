"""People judge: pairs labelled, checkpoints compared blind."""
