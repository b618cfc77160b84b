"""
The commands: arguments, output and exit codes. No logic of its own.
"""
