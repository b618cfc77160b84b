"""
The control plane of a host that runs AI agents: egress decided in the kernel and by name.
"""
