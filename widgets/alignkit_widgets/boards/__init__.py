"""Boards for human judgement: label pairs, compare checkpoints blind."""
