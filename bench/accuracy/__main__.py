"""``python -m bench.accuracy``."""

import sys

from bench.accuracy.command import main
from scissor_vllm.loadtest.process import end_on_sigterm

end_on_sigterm()
sys.exit(main(sys.argv[1:]))
