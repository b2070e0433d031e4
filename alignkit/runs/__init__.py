"""The files of a run: records, stages, frozen checkpoints."""
