"""``python -m scissor_vllm.cli`` is the command ``scissor-vllm``."""

import sys

from scissor_vllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
