"""distbench: does the row cut in front of `fused_moe` change a bit, on any rank?"""

__version__ = "0.1.0"
