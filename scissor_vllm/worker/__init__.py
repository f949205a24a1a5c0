"""The worker's process: vision tower, compression, positions, feature cache."""
