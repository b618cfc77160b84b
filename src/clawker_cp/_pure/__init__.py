"""
Plain Python twins of `_fast`; imported through `accel` only.
"""
