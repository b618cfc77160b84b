"""
The egress proxy: its resources from a plan, its files, its acknowledgement, and the process.
"""
