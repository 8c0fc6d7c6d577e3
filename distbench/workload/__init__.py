"""The bits that go in, the same on every rank and device, and the bits that must come out."""
