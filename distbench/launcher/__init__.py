"""Ranks as processes: started, watched, ended; their inputs, limits and results."""
