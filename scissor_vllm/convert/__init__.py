"""Converts original LLaVA-OneVision checkpoints, such as LLaVA-Scissor's, for vLLM.

``command.py`` is ``scissor-vllm convert SOURCE OUT``. ``config.py`` converts ``config.json``,
``names.py`` maps weight names, ``checkpoint.py`` reads and writes weight files, and
``processing.py`` writes tokenizer and processors.
"""
