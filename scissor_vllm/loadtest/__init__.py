"""The load test ``scissor-vllm bench``: throughput and latency by ratio and concurrency.

    command.py    arguments; the cells to measure
      → clips.py      the videos that are sent
      → workload.py   a cell: its ratios, its concurrency, its request rate
      → sweep.py      each cell in turn: warm up, measure, save
          → client.py     vLLM's benchmark client, and the fields that it drops
          → server.py     the server's name, version and /metrics
      → results.py    the result file, saved after each cell
      → summary.py    percentiles, throughput and goodput of the raw values
      → table.py, plot.py

``vllm.benchmarks.serve.benchmark``, the machinery of ``vllm bench serve``, sends and times the
requests. It comes with vLLM, each request has its own body and so its own ratio, and its numbers
compare with published ones. GuideLLM 0.8 sets the body once for a run, so a run cannot mix ratios.
AIPerf 0.13 can replay bodies, but pins older versions of huggingface-hub and pillow than vLLM's
packages need. Neither reads the ``video_compression`` of an answer.
"""
