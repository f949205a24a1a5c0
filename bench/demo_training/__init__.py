"""Training of the demo model; `bench/train_demo.py` is the command."""
