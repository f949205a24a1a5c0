"""The engine core's process: what one step may encode."""
