"""Video reading: bytes in, sampled RGB frames out."""
