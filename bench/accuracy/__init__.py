"""Accuracy against the retention ratio, measured through a running server.

command.py    arguments: run, methods, convert, table, plot, summary
  → questions.py    a folder of videos and what is asked about them (bench/world makes one)
    ← benchmarks/     public ones, from the files that their authors publish
  → servers.py      a server a method, in turn
  → client.py       asks by the openai client; checks how many tokens were kept
      → scoring.py      whether an answer is the expected one
  → results.py      every answer, saved as it comes
  → summary.py      shares, intervals, differences (statistics.py)
  → table.py, plot.py
"""
