"""Compression of real vision features of real videos: what reconstruction alone can tell."""
