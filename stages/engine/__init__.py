"""The training loop and what it stands on: learner, loader, checkpoints, resume state, metrics. It knows no model and no data."""
