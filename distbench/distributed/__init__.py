"""Ranks and how they exchange tensors: process groups, heartbeats, all-to-all and shared memory."""
