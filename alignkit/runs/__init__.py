"""What a run leaves behind: records, stages, frozen checkpoints."""
