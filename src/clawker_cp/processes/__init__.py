"""
Child processes: starting, adopting, watching and ending them.
"""
