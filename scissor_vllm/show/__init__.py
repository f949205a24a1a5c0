"""What compression did to a video, drawn: ``scissor-vllm show``, and the server's page.

``picture.py`` is what is drawn, ``encoder.py`` makes tokens without a server, ``png.py`` and
``html.py`` draw, ``command.py`` is the command. ``web.py`` serves ``page/`` and answers its
requests, by ``worker.py`` in vLLM's workers. Nothing here is loaded where nothing is drawn.
"""

WORKER_EXTENSION = "scissor_vllm.show.worker.PictureWorker"
"""What the page needs as vLLM's ``--worker-extension-cls``."""
