"""Pictures of compressed videos: ``scissor-vllm show``, and the server's page.

``picture.py`` holds a picture's data. ``encoder.py`` computes tokens without a server. ``png.py``
and ``html.py`` draw. ``command.py`` is the command. ``web.py`` serves ``page/`` and answers its
requests by ``worker.py`` in vLLM's workers. A server without ``--web-page`` imports none of these.
"""

WORKER_EXTENSION = "scissor_vllm.show.worker.PictureWorker"
"""The page's value for vLLM's ``--worker-extension-cls``."""
