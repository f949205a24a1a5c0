"""What differs between the supported versions of vLLM, in one place."""


def cli_env_setup() -> None:
    """Set the environment that vLLM's own command sets before it starts processes.

    vLLM 0.33 moved the function; the second import can go with support for 0.32.
    """
    try:
        from vllm.entrypoints.common.startup import cli_env_setup as setup
    except ImportError:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup as setup
    setup()
