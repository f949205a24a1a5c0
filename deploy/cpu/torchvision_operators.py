"""Lets torchvision's Python code load with a torch build that its compiled code does not fit.

A package index may pair a CPU build of torch with a CUDA build of torchvision. The compiled code
then does not load, and the import fails with "operator torchvision::nms does not exist". Video
processors use the Python code only, and for them it is enough to declare the two operators.

If the import fails, ``deploy/cpu/install.py`` puts this file into site-packages. A ``.pth`` file
imports it when Python starts, because vLLM starts further processes. A torchvision that loads is
never changed. Remove this file when the index carries a CPU torchvision.
"""

import importlib.machinery
import sys

MISSING = "operator torchvision::nms does not exist"
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared = []


class _Loader:
    """Imports torchvision, and again with declared operators if they were missing."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        try:
            self._loader.exec_module(module)
        except RuntimeError as error:
            if MISSING not in str(error) or _declared:
                raise
            _declare()
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            self._loader.exec_module(module)


class _Finder:
    """Finds torchvision as Python does, and wraps its loader."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _declare():
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in OPERATORS:
        library.define(schema)
    _declared.append(library)  # The declaration lives as long as its library object.


if not any(finder is _Finder for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder)
