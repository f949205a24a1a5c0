"""Public benchmarks, each read from the files that its authors publish.

A reader takes the annotations and the folder of the videos and returns questions with the prompt
that the authors, or where they have none lmms-eval, use. No video is decoded or copied.

They are not run through lmms-eval (0.7.3): its OpenAI-compatible model cannot send a
``retention_ratio``, turns videos into pictures unless told not to, and counts a request that failed
as a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bench.accuracy.benchmarks import egoschema, mlvu, mvbench, nextqa, videomme
from bench.accuracy.questions import Question

Reader = Callable[[Path, Path], list[Question]]
"""Questions from the annotations and the folder of the videos."""

BENCHMARKS: Mapping[str, Reader] = {
    "mvbench": mvbench.read,
    "videomme": videomme.read,
    "egoschema": egoschema.read,
    "mlvu": mlvu.read,
    "nextqa": nextqa.read,
}
