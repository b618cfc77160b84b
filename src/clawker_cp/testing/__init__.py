"""
Models and fakes for tests; may import anything, and only tests import it.
"""
