"""The experts by `aiter.fused_moe`: its package, weights and arguments as it wants them, and what it says it ran."""
