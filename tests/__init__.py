"""Tests. Their torch has one thread: threads that wait for each other would hold up the rest."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
