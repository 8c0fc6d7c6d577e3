"""Inputs, bit-identical on every rank and device, and the oracles that give the expected outputs."""
