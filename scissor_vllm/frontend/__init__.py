"""The API server's process: requests, video reading, the multimodal processor."""
