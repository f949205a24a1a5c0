#!/bin/sh
# Runs `scissor-vllm` with the API key of VLLM_API_KEY, or of the file API_KEY_FILE.
set -eu
if [ -z "${VLLM_API_KEY:-}" ] && [ -r "${API_KEY_FILE:-}" ]; then
  VLLM_API_KEY=$(cat "$API_KEY_FILE")
fi
if [ -z "${VLLM_API_KEY:-}" ]; then
  echo "an API key is needed, VLLM_API_KEY is empty: set it, or name a file in API_KEY_FILE" >&2
  exit 1
fi
export VLLM_API_KEY
# huggingface_hub reads the token from this file.
if [ -e "${HF_TOKEN_PATH:-}" ] && [ ! -r "$HF_TOKEN_PATH" ]; then
  echo "the user $(id -u) cannot read $HF_TOKEN_PATH: let that user read the file of HF_TOKEN_FILE" >&2
  exit 1
fi
# The load test, a client, sends this key.
export OPENAI_API_KEY="${OPENAI_API_KEY:-$VLLM_API_KEY}"
exec scissor-vllm "$@"
