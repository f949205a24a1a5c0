"""The load test, ``scissor-vllm bench``: what a server carries at each ratio and concurrency.

    command.py    arguments; the cells to measure
      → clips.py      the videos that are sent
      → workload.py   a cell: its ratios, its concurrency, its request rate
      → sweep.py      each cell in turn: warm up, measure, save
          → client.py     vLLM's own benchmark client, and what it leaves out
          → server.py     the server's name, version and /metrics
      → results.py    the result file, saved after each cell
      → summary.py    percentiles, throughput and goodput of the raw values
      → table.py, plot.py

Requests are sent and timed by ``vllm.benchmarks.serve.benchmark``, the machinery of
``vllm bench serve``: it is installed wherever vLLM is, a request of it carries its own body, so its
own ratio, and its numbers compare with those that others publish. GuideLLM 0.8 sets the body once
for a whole run, so one run cannot mix ratios. AIPerf 0.13 can replay bodies, but pins versions of
huggingface-hub and pillow that vLLM's other packages have left behind, and needs an environment of
its own. Neither reads the ``video_compression`` of an answer.
"""
