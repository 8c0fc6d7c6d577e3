"""Dispatch and combine through mori."""
