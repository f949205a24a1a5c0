"""The small model that needs no download, a clip, and a client that shows the ratio at work."""
