"""The worker process: vision tower, compression, positions and feature cache."""
