"""
The Docker engine: agents are containers of a daemon on this host.
"""
