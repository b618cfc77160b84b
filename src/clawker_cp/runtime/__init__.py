"""
What every long-running part needs: an entry point on uvloop, and supervised tasks.
"""
