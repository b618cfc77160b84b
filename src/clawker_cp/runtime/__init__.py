"""
What every long-running part needs: an entry point on uvloop, supervised tasks, time, health and events.
"""
