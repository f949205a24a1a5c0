"""What every result file of a benchmark says, and the way to write one."""

from scissor_vllm.loadtest.record import COMMIT_VARIABLE, environment, write_json

__all__ = ["COMMIT_VARIABLE", "environment", "write_json"]
