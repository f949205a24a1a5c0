"""``python -m bench.hostile_requests``."""

import sys

from bench.hostile_requests.command import main
from scissor_vllm.loadtest.process import end_on_sigterm

end_on_sigterm()
sys.exit(main(sys.argv[1:]))
