"""Original LLaVA-OneVision checkpoints, LLaVA-Scissor's among them, in the form that vLLM loads.

``command.py`` is ``scissor-vllm convert SOURCE OUT``; ``config.py`` says what the original's
``config.json`` means, ``names.py`` what each weight is called, ``checkpoint.py`` reads and writes
the files of weights, ``processing.py`` tokenizer and processors.
"""
