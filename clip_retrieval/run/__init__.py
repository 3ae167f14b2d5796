"""A run: its options, folder, model, data, scores and checkpoints."""
