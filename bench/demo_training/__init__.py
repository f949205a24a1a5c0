"""Training of the demo model; `python -m bench.train_demo` is the command."""
