"""The demo: a small model in the package, a clip, and a client that sends several ratios."""
