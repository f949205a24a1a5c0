"""Builders of tiny checkpoints with random weights, one file a family."""
