"""What the programs share at their start: the folder of a run."""
