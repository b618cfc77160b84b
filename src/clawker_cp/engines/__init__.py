"""
Where agents live: engines behind one shape, so that the rest never asks who runs them.
"""
