"""Model folders in the shapes of published models: ``python -m bench.model_shapes 7b FOLDER``.

No checkpoint is needed: random weights in the real shapes give honest speed. Answers mean nothing.
"""
