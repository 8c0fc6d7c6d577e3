"""Helpers that know nothing of experts or ranks: devices, statistics, signals, processes, text."""
