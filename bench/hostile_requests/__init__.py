"""Thousands of requests that a server must refuse, beside others that it must answer right."""
